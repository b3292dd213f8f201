"""What the parts of one attempt share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sapo_ray.config.spec import JobSpec
from sapo_ray.driver.hold import DiskHold
from sapo_ray.driver.journal import Journal
from sapo_ray.driver.orders import StandingOrders
from sapo_ray.driver.pulse import Pulse
from sapo_ray.driver.rundir import stop_if_superseded


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt of a run, once it is in the journal."""

    spec: JobSpec
    number: int
    run_dir: Path
    journal: Journal
    orders: StandingOrders
    hold: DiskHold
    pulse: Pulse

    def stop_if_superseded(self) -> None:
        """Raise Superseded if a later attempt has the run: nothing more is written then."""
        stop_if_superseded(self.run_dir, self.journal)

    async def sync(self) -> None:
        """The journal is durable when this returns, however long that takes on a full disk. Raises as the hold does."""
        await self.hold.through(self._sync)

    async def _sync(self) -> None:
        with self.pulse.at("storage", "write", "making the journal durable"):
            await self.journal.sync()
