"""A service in a process of its own, without a cluster: `python client_server.py DATA_DIR PORT` (SAPO_ADMIN_KEY)."""

from __future__ import annotations

import sys

import uvicorn

from sapo_ray.control.access import first_admin_key
from sapo_ray.control.app import create_app
from sapo_ray.control.launcher import LaunchRequest, LaunchStatus
from sapo_ray.control.settings import Settings
from sapo_ray.control.store import Store


class NoCluster:
    """Drivers are played by the tests."""

    def ping(self) -> None:
        return None

    def submit(self, request: LaunchRequest) -> None:
        raise AssertionError(request)

    def status(self, submission_id: str) -> LaunchStatus:
        return LaunchStatus(state="UNKNOWN")

    def stop(self, submission_id: str) -> None:
        return None

    def logs(self, submission_id: str) -> str:
        return f"driver of {submission_id}\n"


def main(data_dir: str, port: int) -> None:
    settings = Settings(data_dir=data_dir, port=port)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    store = Store(settings.database_url)
    store.migrate()
    first_admin_key(store, settings)
    uvicorn.run(create_app(settings, store, NoCluster()), port=port, log_level="warning", timeout_graceful_shutdown=1)
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
