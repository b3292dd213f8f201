"""`sapo-ray doctor`: is everything fit to run the service and its jobs?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from sapo_ray import __version__
from sapo_ray.cli.options import AsJson, console, print_json
from sapo_ray.ending import user_errors

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


def doctor(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at every node of Ray too, by a short job on it.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="dns, ray, versions, clock, storage, shm, gpu or nccl; repeatable. All if not given."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the service; SAPO_DATA_DIR if not given.")] = None,
    ray_jobs_url: Annotated[
        str | None, typer.Option(help="Dashboard of the Ray cluster; SAPO_RAY_JOBS_URL if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what the service and its jobs stand on, each with a remedy: Ray, versions, storage, /dev/shm, GPUs, NCCL...

    Reads the settings that `serve` reads (SAPO_...). Exit code 0: nothing failed; 1: a check failed,
    or a setting is wrong; 2: wrong usage. Nothing is changed.
    """
    with user_errors():
        from sapo_ray.control.settings import load_settings
        from sapo_ray.doctor import CHECKS, local
        from sapo_ray.doctor import cluster as nodes

        unknown = [one for one in only or [] if one not in CHECKS]
        if unknown:
            raise typer.BadParameter(f"{unknown[0]!r} is no check; there are {', '.join(CHECKS)}", param_hint="--only")
        checks = [one for one in CHECKS if one in (only or CHECKS)]
        given = {"data_dir": data_dir, "ray_jobs_url": ray_jobs_url}
        settings = load_settings(**{name: value for name, value in given.items() if value is not None})
        if cluster and not (settings.shared_cluster and "ray_jobs_url" in settings.model_fields_set):
            why = "name its dashboard with --ray-jobs-url or SAPO_RAY_JOBS_URL"
            if not settings.shared_cluster:
                why = "each job has one of its own while it runs (SAPO_SHARED_CLUSTER=false)"
            raise typer.BadParameter(f"there is no cluster: {why}", param_hint="--cluster")
        found = []
        for look in (local.look, nodes.look) if cluster else (local.look,):
            for one in look(settings, checks):
                found.append(one)
                if not as_json:
                    _say(one.status, one.check, one.where, one.detail, one.remedy)
        good = all(one.status != "failed" for one in found)
        if as_json:
            print_json({"ok": good, "version": __version__, "findings": [asdict(one) for one in found]})
        else:
            failed = sum(one.status == "failed" for one in found)
            console.print("[green]nothing failed[/]" if good else f"[red]{failed} failed[/]", highlight=False)
    raise typer.Exit(0 if good else 1)


def _say(status: str, check: str, where: str, detail: str, remedy: str) -> None:
    place = "" if where == "here" else f" [{where}]"
    text = f"[{COLOURS[status]}]{status:<8}[/] {check:<9}{escape(place)} {escape(detail)}"
    console.print(text, highlight=False, soft_wrap=True)
    if remedy:
        console.print(f"         -> {escape(remedy)}", highlight=False, soft_wrap=True)
