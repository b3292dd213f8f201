"""Who asks: API keys, scopes, tenants. A tenant never learns that another's things exist."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from fastapi import Depends, Request
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from sapo_ray.api.problems import FieldProblem
from sapo_ray.control.problems import Refused, did_you_mean, several
from sapo_ray.control.ratelimit import Buckets
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import KeyRow, Store, StoreUnavailable, keys

T = TypeVar("T")
Scope = Literal["read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "submit", "admin")
CACHE_S = 5.0
"""A key found good is not looked up again for so long, so a key revoked on another replica works that much longer."""
_CACHED = 10_000

bearer = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    description="`Authorization: Bearer sapo_...`; `sapo-ray serve` prints the first.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The holder of a valid key."""

    key_id: str
    tenant: str
    scopes: frozenset[str]
    expires_at: float | None
    operator: bool
    """Admin of the operator's tenant: manages keys of all tenants and sees /metrics."""

    def may(self, scope: Scope) -> bool:
        """Whether the key has the scope; admin has all."""
        return bool(self.scopes & {"admin", scope})


@dataclass(kw_only=True, slots=True, eq=False)
class Held:
    """Something that a caller holds open, for as long as the key is valid."""

    key_id: str
    revoked: bool = False
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def revoke(self) -> None:
        """From any thread."""
        self.revoked = True
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.news.set)


class Gate:
    """Finds the caller of a request, and counts what each may ask for."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._operator_tenant = settings.operator_tenant
        self._buckets = Buckets(settings.rate_per_s, settings.rate_burst)
        self._known: OrderedDict[str, tuple[float, Caller]] = OrderedDict()
        self._held: dict[str, set[Held]] = {}
        self._seen: dict[str, float] = {}
        """When the key of something held was last found valid."""
        self._lock = threading.Lock()

    async def caller(self, secret: str | None, client: str) -> Caller:
        """The holder of `secret`. Raises Refused: 401 without a valid key, 429 for too many requests."""
        if secret is None:
            self._count(f"address {client}")
            raise _unauthenticated("no API key came with the request")
        hashed = hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
        found = self._cached(hashed)
        if found is None:
            with self.guess(client) as known:
                found = known(await run_in_threadpool(self._find, secret, hashed))
        if found is None:
            raise _unauthenticated("the API key is not valid: it is unknown, was revoked, or has expired")
        self._count(found.key_id)
        return found

    @contextlib.contextmanager
    def guess(self, client: str) -> Iterator[Callable[[T | None], T | None]]:
        """Around the look for a secret: only one that is not known counts for the address that sent it.

        It counts beforehand, so that no more look at once than may. Raises Refused (429).
        """
        name, good = f"address {client}", True

        def known(found: T | None) -> T | None:
            nonlocal good
            good = found is not None
            return found

        self._count(name)
        try:
            yield known
        finally:
            if good:
                self._buckets.give_back(name)

    def forget(self, key_id: str) -> None:
        """Look the key up again at its next use; what is held open with it ends."""
        with self._lock:
            for held in self._held.get(key_id, ()):
                held.revoke()
            for hashed in [hashed for hashed, (_, caller) in self._known.items() if caller.key_id == key_id]:
                del self._known[hashed]

    @contextlib.contextmanager
    def hold(self, key_id: str, every_s: float, ended: Callable[[], None]) -> Iterator[Held]:
        """While something is open that the key opened. `ended` is called on the loop once the key is not valid any
        more: at once if it is forgotten here, else found within `every_s`."""
        held = Held(key_id=key_id)
        with self._lock:
            self._held.setdefault(key_id, set()).add(held)
        guard = asyncio.create_task(self._guard(held, every_s, ended), name="guard of a key")
        try:
            yield held
        finally:
            guard.cancel()
            with self._lock:
                self._held[key_id].discard(held)
                if not self._held[key_id]:
                    del self._held[key_id]
                    self._seen.pop(key_id, None)

    async def _guard(self, held: Held, every_s: float, ended: Callable[[], None]) -> None:
        while not held.revoked:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await held.news.wait()
            if time.monotonic() - self._seen.get(held.key_id, -CACHE_S) < CACHE_S:
                continue  # another of this key's has just looked
            with contextlib.suppress(StoreUnavailable):  # nothing comes down the stream either
                if not held.revoked and not await run_in_threadpool(self._valid, held.key_id):
                    self.forget(held.key_id)
        ended()

    def _valid(self, key_id: str) -> bool:
        began = time.monotonic()
        with self._store.read() as session:
            row = session.get(KeyRow, key_id)
            valid = row is not None and row.revoked_at is None and _lives(row.expires_at)
        if valid:
            self._seen[key_id] = began
        return valid

    def _cached(self, hashed: str) -> Caller | None:
        with self._lock:
            until, caller = self._known.get(hashed, (0.0, None))
        valid = caller is not None and time.monotonic() < until
        return caller if valid and caller is not None and _lives(caller.expires_at) else None

    def _find(self, secret: str, hashed: str) -> Caller | None:
        began = time.monotonic()
        with self._store.read() as session:
            row = keys.find_key(session, secret)
        if row is None:
            return None
        if keys.stale_use(row, time.time()):
            # For people, at most once a minute; a database that can be read but not written must not close the door.
            with contextlib.suppress(StoreUnavailable), self._store.begin() as session:
                keys.touch(session, row.id, time.time())
        caller = self._as_caller(row)
        with self._lock:
            self._known[hashed] = (began + CACHE_S, caller)
            self._known.move_to_end(hashed)
            if len(self._known) > _CACHED:
                self._known.popitem(last=False)
        return caller

    def _as_caller(self, row: KeyRow) -> Caller:
        scopes = frozenset(row.scopes)
        return Caller(
            key_id=row.id,
            tenant=row.tenant,
            scopes=scopes,
            expires_at=row.expires_at,
            operator="admin" in scopes and row.tenant == self._operator_tenant,
        )

    def _count(self, name: str) -> None:
        wait = self._buckets.take(name)
        if wait > 0:
            raise Refused(
                429,
                "rate_limited",
                "this key, or this address without a valid one, sends more requests than it may",
                hint="wait as long as Retry-After says; watch jobs through their event streams",
                headers={"Retry-After": str(math.ceil(wait))},
            )


def require(scope: Scope) -> Callable[..., object]:
    """A dependency that gives the caller, or refuses: 401, 429, or 403 without the scope."""

    async def check(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> Caller:
        gate: Gate = request.app.state.control.gate
        client = request.client.host if request.client else "unknown"
        caller = await gate.caller(credentials.credentials if credentials else None, client)
        request.state.caller = caller
        refuse_unknown_parameters(request)
        if not caller.may(scope):
            raise Refused(
                403,
                "forbidden",
                f"this needs a key of scope {scope}; this one has {', '.join(sorted(caller.scopes)) or 'none'}",
                hint="an admin makes keys: POST /v1/api-keys",
            )
        return caller

    return check


def refuse_unknown_parameters(request: Request) -> None:
    """A misspelt `?dry_run` must not submit a job. Raises Refused (422)."""
    route: APIRoute = request.scope["route"]
    operation = str(route.operation_id)
    if operation not in _QUERY_NAMES:
        _QUERY_NAMES[operation] = tuple(one.alias for one in get_flat_dependant(route.dependant).query_params)
    known = _QUERY_NAMES[operation]
    unknown = [name for name in request.query_params if name not in known]
    if unknown:
        problems = [
            FieldProblem(param=name[:80], detail=f"{name[:80]!r} is not a parameter here{did_you_mean(name, known)}")
            for name in unknown[:20]
        ]
        raise several(problems, code="invalid_request", status=422, what="the query")


_QUERY_NAMES: dict[str, tuple[str, ...]] = {}
"""Query parameters by operation id; routes are the same in every application."""

Reader = Annotated[Caller, Depends(require("read"))]
Submitter = Annotated[Caller, Depends(require("submit"))]
Admin = Annotated[Caller, Depends(require("admin"))]


def first_admin_key(store: Store, settings: Settings) -> str | None:
    """Make sure that there is an admin key; returns a secret that was made here, to be printed once.

    With SAPO_ADMIN_KEY that key is made, unless it was revoked (nothing to print); else one is made if the operator's
    tenant has no live admin key.
    """
    now = time.time()
    given = settings.admin_key.get_secret_value() if settings.admin_key else None
    with store.begin() as session:
        if given is not None:
            keys.ensure_key(session, settings.operator_tenant, "admin (environment)", ["admin"], given)
            return None
        there = keys.list_keys(session, settings.operator_tenant)
        if any("admin" in row.scopes and row.revoked_at is None and _lives(row.expires_at, now) for row in there):
            return None
        return keys.create_key(session, settings.operator_tenant, "admin (first)", ["admin"])[1]


def _lives(expires_at: float | None, now: float | None = None) -> bool:
    return expires_at is None or expires_at > (time.time() if now is None else now)


def _unauthenticated(detail: str) -> Refused:
    return Refused(
        401,
        "unauthenticated",
        detail,
        hint="send `Authorization: Bearer sapo_...`",
        headers={"WWW-Authenticate": 'Bearer realm="sapo-ray"'},
    )
