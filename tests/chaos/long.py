"""The long form of the chaos suite: `make chaos SEEDS="1 2 3" MINUTES=10 FAULTS="grader=60 rollout=20 driver=2"`.

For each seed a run of its own, with random faults for so many minutes, and its audit. Ends with 1 at the first that
breaks a promise; its folder is kept. Wants tests and tests/integration on the PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from campaign import WEIGHTS, Campaign
from chaos_run import ChaosRun
from small_disk import perhaps_small_disk

DISK_MB = 400
ENDLESS = {"CHAOS_REPLACEMENTS": "1000000", "CHAOS_RESTARTS": "1000000", "CHAOS_DISK_CHECK_S": "1"}


def main() -> int:
    """Run all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults, for each seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--faults", nargs="*", default=[], metavar="FAULT=WEIGHT", help=f"of {', '.join(WEIGHTS)}")
    options = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    weights = {name: float(weight) for name, _, weight in (one.partition("=") for one in options.faults)} or WEIGHTS
    for seed in options.seeds:
        folder = Path(tempfile.mkdtemp(prefix=f"sapo-chaos-{seed}-"))
        settings = ("steps=100000", f"rollout.workers={options.workers}", f"rollout.max_workers={options.workers + 1}")
        settings += ("rollout.group_deadline_s=60", "checkpoint.min_free_gb=0")
        with perhaps_small_disk(folder / "disk", DISK_MB) as mounted:
            if not mounted:
                print("no small file system can be mounted here: no disk is filled", flush=True)
            run = ChaosRun(folder, settings, faults=dict(ENDLESS), disk=folder / "disk" if mounted else None)
            campaign = Campaign(run, seed, options.workers, dict(weights))
            try:
                totals = campaign.go(60 * options.minutes).totals
            except AssertionError as error:
                kept = shutil.copytree(run.run_dir, folder / "run", dirs_exist_ok=True)
                print(f"seed {seed}: BROKEN after {dict(campaign.kills)}; see {kept}\n{error}", flush=True)
                return 1
            finally:
                run.kill_all()
        print(
            f"seed {seed}: {dict(campaign.kills)}; {totals['steps']} steps, {totals['samples']} samples, "
            f"{totals['lost'] + totals['samples lost']} lost, {totals['doubled'] + totals['samples doubled']} doubled; "
            f"{folder}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
