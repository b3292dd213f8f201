"""What stand-ins for an API server do by published rules: refusals, patches, and a certificate of their own."""

from __future__ import annotations

import copy
import datetime
import ipaddress
from pathlib import Path
from typing import Any

Object = dict[str, Any]


REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class Failure(Exception):
    """Answered as a Status."""

    def __init__(self, code: int, reason: str, message: str, name: str = "") -> None:
        super().__init__(message)
        self.body = {
            **{"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"},
            **{"message": message, "reason": reason, "code": code, "details": {"name": name} if name else {}},
        }
        self.code = code


def granted(rules: list[Object], verb: str, group: str, resource: str, name: str) -> bool:
    """Whether one of a Role's rules grants it."""
    return any(
        group in rule["apiGroups"]
        and resource in rule["resources"]
        and verb in rule["verbs"]
        and name in rule.get("resourceNames", [name])
        for rule in rules
    )


def review(rules: list[Object], namespace: str, body: Object) -> Object:
    """A SelfSubjectAccessReview, answered from the rules of the one namespace in which the asker has any."""
    kinds = ("authorization.k8s.io/v1", "SelfSubjectAccessReview")
    if (body.get("apiVersion"), body.get("kind")) != kinds:
        raise Failure(400, "BadRequest", f"{body.get('kind')} is not {kinds[1]}")
    asked = body["spec"]["resourceAttributes"]
    if not asked.keys() <= {"verb", "group", "resource", "namespace", "name"}:
        raise Failure(400, "BadRequest", f"unknown fields in {asked}")
    right = (asked["verb"], asked["group"], asked["resource"], asked.get("name", ""))
    allowed = asked["namespace"] == namespace and granted(rules, *right)
    return body | {"status": {"allowed": allowed}}


def merge(into: Object, change: Object) -> Object:
    """RFC 7386."""
    for key, value in change.items():
        if value is None:
            into.pop(key, None)
        elif isinstance(value, dict):
            into[key] = merge(into[key] if isinstance(into.get(key), dict) else {}, value)
        else:
            into[key] = value
    return into


def json_patch(thing: Object, operations: list[Object]) -> Object:
    """RFC 6902, of which add, replace, remove and test are used."""
    thing = copy.deepcopy(thing)
    for one in operations:
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in one["path"].split("/")[1:]]
        place: Any = thing
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        key = int(last) if isinstance(place, list) and last != "-" else last
        if one["op"] == "test":
            if place[key] != one["value"]:
                raise Failure(422, "Invalid", f"testing {one['path']}: value differs")
        elif one["op"] == "remove":
            del place[key]
        elif isinstance(place, list):
            place.append(one["value"]) if last == "-" else place.__setitem__(key, one["value"])
        else:
            place[key] = one["value"]
    return thing


def certificate(cert: Path, key: Path) -> None:
    """For 127.0.0.1, signed by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
