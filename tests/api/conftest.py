"""The application over a real store, in this process; a server process of its own where it matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from api_parts import Connect
from api_server import ADMIN_KEY, FakeCluster
from starlette.testclient import TestClient

from sapo_ray.control.access import first_admin_key
from sapo_ray.control.app import create_app
from sapo_ray.control.settings import Settings, load_settings
from sapo_ray.control.store import Store, keys


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("SAPO_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def backend() -> str:
    """SQLite, unless a test is parametrised over backends."""
    return "sqlite"


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def configure(tmp_path: Path, store_url: str) -> Callable[..., Settings]:
    """Settings for this test, with changes."""

    def make(**over: object) -> Settings:
        usual = {"data_dir": tmp_path / "data", "database_url": store_url, "admin_key": ADMIN_KEY, "rate_per_s": 0}
        return load_settings(**{**usual, **over})

    return make


@pytest.fixture
def connect(configure: Callable[..., Settings], store: Store, cluster: FakeCluster) -> Iterator[Connect]:
    """Starts the application with changed settings; gives a client with the operator's admin key."""
    with ExitStack() as stack:

        def start(**over: object) -> TestClient:
            settings = configure(**over)
            first_admin_key(store, settings)
            app = create_app(settings, store, cluster)  # type: ignore[arg-type]
            client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
            client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
            return client

        yield start


@pytest.fixture
def admin(connect: Connect) -> TestClient:
    """The operator's admin, on usual settings."""
    return connect()


@pytest.fixture
def holder(admin: TestClient, store: Store) -> Callable[..., TestClient]:
    """Gives a client with a key of some tenant and scopes, on the admin's application."""

    def make(tenant: str = "acme", *scopes: str) -> TestClient:
        with store.begin() as session:
            _, secret = keys.create_key(session, tenant, "a test", list(scopes) or ["read", "submit"])
        client = TestClient(admin.app, raise_server_exceptions=False)
        client.headers["Authorization"] = f"Bearer {secret}"
        return client

    return make


@pytest.fixture
def acme(holder: Callable[..., TestClient]) -> TestClient:
    """A user of the tenant acme, who may read and submit."""
    return holder("acme")


@pytest.fixture
def rival(holder: Callable[..., TestClient]) -> TestClient:
    """A user of another tenant."""
    return holder("rival")
