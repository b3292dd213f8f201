"""What a job may reach: only what the operator allows.

A path is a builtin (`builtin:addition`), an uploaded data set (`dataset:<id>`), a file or folder of the cluster
(absolute), or a Hub id. Files are compared by where they really are, links resolved, so that neither `..` nor a link
leads out of an allowed folder; everything that is none of these forms is refused, because a driver would look for it in
its own working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sapo_ray.api.problems import FieldProblem
from sapo_ray.config.spec import JobSpec, SourceSpec
from sapo_ray.control import tenant_secrets
from sapo_ray.control.problems import Refused, several
from sapo_ray.control.settings import Settings

DATASET = "dataset:"
FETCHED = "GET /v1/jobs/{job_id}/export lists its files"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLIT = re.compile(r"[\w][\w.+:%\[\]-]*")


def check(
    spec: JobSpec,
    settings: Settings,
    tenant: str,
    *,
    stored_path: Callable[[str], str | None],
    several_tenants: Callable[[], bool],
) -> None:
    """Refuse a job that reaches for what is not allowed; one answer names every such field.

    Args:
        stored_path: the file of one of the tenant's data sets by id, None if there is no such data set.
        tenant: whose job it is.
        several_tenants: whether others share the cluster, who would have to trust this job's code.

    Raises:
        Refused: 403 `not_allowed`.
    """
    found = [
        *_model(spec, settings),
        *_sources(spec, settings, stored_path),
        *_code(spec, settings, several_tenants),
        *_places(spec, settings),
        *_secrets(spec, settings, tenant),
    ]
    if found:
        raise several(found, code="not_allowed", status=403, what="the job")


def with_files(spec: JobSpec, stored_path: Callable[[str], str | None]) -> JobSpec:
    """The job as the driver gets it: `dataset:<id>` replaced by the file. Raises Refused (409) if one was deleted."""
    found = spec.model_copy(deep=True)
    for key, source in _each_source(found):
        if source.path.startswith(DATASET):
            path = stored_path(source.path.removeprefix(DATASET))
            if path is None:
                raise Refused(409, "not_allowed", f"{key}.path {source.path!r}: the data set was deleted", param=key)
            source.name = source.name or source.path.replace(":", "-")
            source.path = path
    return found


def dataset_ids(spec: Mapping[str, Any]) -> set[str]:
    """Uploads that a resolved job reads, as it is stored."""
    paths = [source["path"] for source in (*spec["data"]["train"], *spec["evaluation"]["data"])]
    return {path.removeprefix(DATASET) for path in paths if path.startswith(DATASET)}


def allowed(value: str, patterns: Sequence[str]) -> bool:
    """Whether a path of any form is allowed."""
    if os.path.isabs(value):
        return _allowed_file(value, patterns)
    builtin = re.fullmatch(r"builtin:[\w.-]+", value) is not None
    if not builtin and not _HUB_ID.fullmatch(value):
        return False
    return any(fnmatchcase(value, pattern) for pattern in patterns if not os.path.isabs(pattern))


def allowed_output(uri: str, patterns: Sequence[str]) -> bool:
    """Whether a model may be copied there. Local folders are compared as such, however they are written."""
    path = _local(uri)
    if path is not None:
        return _allowed_file(path, [_local(pattern) or pattern for pattern in patterns])
    return any(fnmatchcase(uri, pattern) for pattern in patterns if "://" in pattern)


def _local(uri: str) -> str | None:
    """The path of a local folder, None for any other place."""
    path = uri.removeprefix("file://").removeprefix("local://")
    return path if path.startswith("/") else None


def _allowed_file(value: str, patterns: Sequence[str]) -> bool:
    if "\0" in value or ".." in Path(value).parts:
        return False
    real = os.path.realpath(value)
    return any(fnmatchcase(real, _real_pattern(pattern)) for pattern in patterns if os.path.isabs(pattern))


def _real_pattern(pattern: str) -> str:
    """A pattern with the links of its literal beginning resolved: the operator may name a folder by a link."""
    literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    folder = literal if literal == pattern else literal[: literal.rfind("/") + 1]
    real = os.path.realpath(folder) if folder != "/" else "/"
    rest = pattern[len(folder) :]
    return real if not rest else f"{real.rstrip('/')}/{rest}"


def _model(spec: JobSpec, settings: Settings) -> Iterator[FieldProblem]:
    if not allowed(spec.model.path, settings.allow_models):
        yield _problem("model.path", spec.model.path, settings.allow_models, "GET /v1/models lists it too")
    if spec.model.revision is not None and not re.fullmatch(r"[\w][\w./-]*", spec.model.revision):
        yield FieldProblem(
            param="model.revision", detail=f"model.revision {spec.model.revision!r} is not a branch, tag or commit"
        )


def _each_source(spec: JobSpec) -> Iterator[tuple[str, SourceSpec]]:
    for section, sources in (("data.train", spec.data.train), ("evaluation.data", spec.evaluation.data)):
        for number, source in enumerate(sources):
            yield f"{section}.{number}", source


def _sources(spec: JobSpec, settings: Settings, stored_path: Callable[[str], str | None]) -> Iterator[FieldProblem]:
    for key, source in _each_source(spec):
        name = f"{key}.path"
        if source.path.startswith(DATASET):
            if not any(fnmatchcase(source.path, pattern) for pattern in settings.allow_data):
                yield _problem(name, source.path, settings.allow_data)
            elif stored_path(source.path.removeprefix(DATASET)) is None:
                detail = f"{name} {source.path[:80]!r}: there is no such data set; GET /v1/datasets lists yours"
                yield FieldProblem(param=name, detail=detail)
        elif not allowed(source.path, settings.allow_data):
            yield _problem(name, source.path, settings.allow_data, "or upload it: POST /v1/datasets")
        for field, value in (("split", source.split), ("config", source.config)):
            # A folder's file is found by its split's name: with `/` in it that would be a file elsewhere.
            if value is not None and (not _SPLIT.fullmatch(value) or ".." in value):
                detail = f"{key}.{field} {value[:80]!r} must be a plain name of letters, digits, `_`, `-`, `.`"
                yield FieldProblem(param=f"{key}.{field}", detail=detail)


def _code(spec: JobSpec, settings: Settings, several_tenants: Callable[[], bool]) -> Iterator[FieldProblem]:
    own = []
    if spec.verifier.reward is not None:
        if any(fnmatchcase(spec.verifier.reward, pattern) for pattern in settings.allow_rewards):
            own.append(("verifier.reward", spec.verifier.reward))
        else:
            yield _problem("verifier.reward", spec.verifier.reward, settings.allow_rewards, "it is code that runs")
    if spec.model.trust_remote_code:
        if settings.allow_trust_remote_code:
            own.append(("model.trust_remote_code", "true"))
        else:
            detail = "model.trust_remote_code true: the operator does not allow code that comes with models; remove it"
            yield FieldProblem(param="model.trust_remote_code", detail=detail)
    if own and settings.shared_cluster and several_tenants():
        for key, value in own:
            detail = f"{key} {value!r}: code of one's own is refused where several tenants share a cluster"
            yield FieldProblem(param=key, detail=detail)


def _places(spec: JobSpec, settings: Settings) -> Iterator[FieldProblem]:
    if spec.run_dir is not None:
        detail = f"run_dir {spec.run_dir[:80]!r}: the service chooses the run's folder; remove the key"
        yield FieldProblem(param="run_dir", detail=detail)
    uri = spec.logging.mlflow_uri
    if uri is not None and not any(fnmatchcase(uri, pattern) for pattern in settings.allow_mlflow):
        yield _problem("logging.mlflow_uri", uri, settings.allow_mlflow)
    place = spec.output.uri
    if place is not None and not allowed_output(place, settings.allow_outputs):
        more = f"without it the model stays with the job: {FETCHED}"
        yield _problem("output.uri", place, settings.allow_outputs, more)


def _secrets(spec: JobSpec, settings: Settings, tenant: str) -> Iterator[FieldProblem]:
    there = tenant_secrets.names(settings.secrets_dir, tenant) if spec.secrets else []
    for number, name in enumerate(spec.secrets):
        key = f"secrets.{number}"
        if name not in there:
            listed = ", ".join(there) or "none"
            detail = f"{key} {name!r}: this tenant has no such secret; the operator keeps for it: {listed}"
            yield FieldProblem(param=key, detail=detail)
            continue
        try:
            tenant_secrets.value(settings.secrets_dir, tenant, name)
        except tenant_secrets.Unusable as error:
            yield FieldProblem(param=key, detail=f"{key} {name!r}: {error}; tell the operator")


def _problem(key: str, value: str, patterns: Sequence[str], more: str = "") -> FieldProblem:
    listed = ", ".join(patterns) or "none"
    detail = f"{key} {value[:120]!r} is not allowed here; allowed: {listed}" + (f" ({more})" if more else "")
    return FieldProblem(param=key, detail=detail)
