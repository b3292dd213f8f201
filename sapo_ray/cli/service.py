"""Commands for the service itself: run it, give out keys, upload data."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from sapo_ray.cli.options import AsJson, console, print_json, service
from sapo_ray.ending import user_errors

keys = typer.Typer(no_args_is_help=True, help="API keys of the service; needs a key of scope admin.")
datasets = typer.Typer(no_args_is_help=True, help="Data on the service, for `path: dataset:<id>` in a job.")


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on; 8800 if not given.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder for jobs, runs and data sets; ./sapo-data if not given.")
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(help="postgresql+psycopg://...; SQLite in the data folder if not given.")
    ] = None,
    ray_jobs_url: Annotated[
        str | None, typer.Option(help="Dashboard of a Ray cluster that is there; one on this machine if not given.")
    ] = None,
) -> None:
    """Run the service that takes jobs over HTTP. Prints the first admin key when it starts for the first time.

    Every setting is also an environment variable, SAPO_ before its name in capitals, e.g. SAPO_DATA_DIR.
    """
    given = {
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "database_url": database_url,
        "ray_jobs_url": ray_jobs_url,
    }
    with user_errors():
        from sapo_ray.control.serve import serve as run

        run({name: value for name, value in given.items() if value is not None})


def migrate() -> None:
    """Bring the database to this version's tables, and end; `serve` does so too when it starts."""
    with user_errors():
        from sapo_ray.control.settings import load_settings
        from sapo_ray.control.store import Store

        settings = load_settings()
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        with closing(Store(settings.database_url)) as store:
            store.migrate()
        print("the database has this version's tables")


def apply_cluster(
    name: Annotated[
        str, typer.Argument(metavar="CONFIGMAP", help="Has its manifest (raycluster.json); it goes with it.")
    ],
) -> None:
    """Make or change the RayCluster that jobs share, from within a pod; leaves to Ray's autoscaler what it decided."""
    with user_errors():
        from sapo_ray.control.kube.client import KubeClient, in_cluster_url
        from sapo_ray.control.settings import load_settings
        from sapo_ray.control.shared_cluster import apply, manifest_of

        settings = load_settings()
        url = settings.kube_url or in_cluster_url()
        with KubeClient(url, settings.kube_account_dir, settings.kube_namespace) as api:
            manifest = manifest_of(api, name)
            print(f"RayCluster {manifest['metadata']['name']}: {apply(api, manifest, name)}")


@datasets.command("upload")
def upload(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL or Parquet.")],
    name: Annotated[str | None, typer.Option(help="Shown in lists; the file's name if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file; every row is checked. Prints the id."""
    with service() as client:
        made = client.datasets.upload(path, name=name)
        if as_json:
            print_json(made.model_dump(mode="json"))
        else:
            print(f"{made.id}  {made.rows} rows; in a job: data: {{train: [{{path: dataset:{made.id}}}]}}")


@datasets.command("list")
def list_datasets(as_json: AsJson = False) -> None:
    """List all data sets, newest first."""
    with service() as client:
        found = [one.model_dump(mode="json") for one in client.datasets.list()]
        _table(found, ("id", "name", "format", "rows", "bytes"), "no data sets", as_json)


@datasets.command("get")
def get_dataset(dataset: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Show one data set, as JSON."""
    with service() as client:
        print_json(client.datasets.get(dataset).model_dump(mode="json"))


@datasets.command("delete")
def delete_dataset(dataset: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Remove a data set."""
    with service() as client:
        client.datasets.delete(dataset)
        print(f"{dataset} is deleted")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for, e.g. laptop.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read: look; submit: also make and change jobs; admin: also keys. Repeatable."),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose; your own if not given.")] = None,
    days: Annotated[int | None, typer.Option(min=1, help="Valid for so many days; for ever if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print its secret, this once."""
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    with service() as client:
        made = client.keys.create(name, scopes=scope or ("read", "submit"), tenant=tenant, expires_at=expires)
        if as_json:
            print_json(made.model_dump(mode="json"))
        else:
            print(made.secret)


@keys.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List keys, without their secrets."""
    with service() as client:
        found = [one.model_dump(mode="json") for one in client.keys.list()]
        _table(found, ("id", "name", "tenant", "prefix", "scopes", "expires_at", "revoked_at"), "no keys", as_json)


@keys.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Let a key be refused from now on."""
    with service() as client:
        client.keys.revoke(key)
        print(f"{key} is revoked")


def models(as_json: AsJson = False) -> None:
    """List what the service lets `model.path` of a job name."""
    with service() as client:
        found = client.models.list()
        _table(found, list(found[0]) if found else (), "no models are allowed", as_json)


def _table(rows: list[dict[str, object]], columns: tuple[str, ...] | list[str], nothing: str, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    from sapo_ray.cli.showing import rows_table

    if rows:
        console.print(rows_table(rows, columns))
    else:
        print(nothing)
