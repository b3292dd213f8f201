"""One learner rank: a DeepSpeed engine behind a few verbs. A plain class; LearnerGroup makes actors of it.

Every verb runs on all ranks in the same order, because each is a collective operation.

    setup            process group, model, engine
    load_batch       this rank's samples of a step
    prepare          log-probs of all samples under the weights before the first update
    forward_backward the gradient of one mini-batch, accumulated over micro-batches
    optim_step       apply it, or skip it if it is not finite
    finish_step      end of the step: token statistics
    publish          weights out, as buckets and a manifest (rank 0 sends, the others gather)
    save, load       checkpoint

The loss is one weighted sum over all tokens of a mini-batch (algorithms.losses), so its gradient is the sum over
micro-batches and ranks. DeepSpeed averages over ranks and would divide by its own accumulation steps: hence the
factor world size and scale_wrt_gas=False, and hence the accumulation boundary is set here.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sapo_ray.actor_log import log_as
from sapo_ray.algorithms.diagnostics import TokenStats
from sapo_ray.algorithms.losses import token_loss
from sapo_ray.algorithms.settings import resolve
from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import TrainingFailed
from sapo_ray.learner import checkpoint
from sapo_ray.learner.batching import MicroBatch, RankPlan
from sapo_ray.learner.engine import Place, build_engine, check_settings, join
from sapo_ray.learner.offending import keep_offending
from sapo_ray.learner.reports import RankInfo, UpdateReport
from sapo_ray.learner.schedule import learning_rate
from sapo_ray.learner.sender import Sender
from sapo_ray.learner.tensors import Batch, collate
from sapo_ray.learner.zero import clear_gradients, gradient_norm
from sapo_ray.types import CompletionPayload, PolicyVersion, WeightsManifest


class LearnerWorker:
    """One rank. Verbs must be called in the order above."""

    def __init__(self, spec: JobSpec, model_path: str, place: Place) -> None:
        log_as(f"learner-{place.rank}")
        self.spec = spec
        self.model_path = model_path
        self.place = place
        self.objective = resolve(spec.algorithm, spec.rollout.max_new_tokens, spec.rollout.temperature)
        self.progress = checkpoint.Progress()
        self._store: Any = None
        self._push: Any = None
        self._plan: RankPlan | None = None
        self._payloads: tuple[CompletionPayload, ...] = ()
        self._old_logp: dict[tuple[int, int], Tensor] = {}
        self._stats = TokenStats()
        self._loss = 0.0
        self._max_log_ratio = 0.0

    # -- start ---------------------------------------------------------------------------------------------------

    def listen(self) -> tuple[str, int]:
        """Rank 0: open the store by which the ranks find each other; returns its address."""
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, self.place.ranks, is_master=True, wait_for_workers=False, use_libuv=True)
        return host, self._store.port

    def setup(self, host: str, port: int) -> RankInfo:
        """Build the engine. Collective.

        Raises
            ModelError, ConfigError: the model or a combination of settings is not supported
        """
        check_settings(self.spec, self.place)
        store = self._store or TCPStore(host, port, self.place.ranks, is_master=False)
        deadlines = self.spec.deadlines
        join(self.place, store, max(deadlines.step_s, deadlines.publish_s, deadlines.checkpoint_s, deadlines.start_s))
        self.engine = build_engine(self.spec, self.model_path, self.place)
        self.sender = Sender(self.engine, self.spec, self.place)
        return RankInfo(
            rank=self.place.rank,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            host=platform.node(),
            parameters=self.sender.parameters,
            published_bytes=sum(bucket.nbytes for bucket in self.sender.buckets),
        )

    # -- training ------------------------------------------------------------------------------------------------

    def load_batch(self, plan: RankPlan, *payloads: CompletionPayload) -> None:
        """Take this rank's samples of a step; payloads in the order of plan.samples."""
        assert len(payloads) == len(plan.samples), (len(payloads), len(plan.samples))
        self._plan, self._payloads = plan, payloads
        self._old_logp = {}
        self._stats = TokenStats()

    def prepare(self) -> None:
        """Log-probs of all samples under the weights of this moment, once per step. Collective.

        Nothing to do with `bypass` (the sampler's stand for them) or with a single update (r is 1, and old_logp is
        the detached log-prob of that update's own forward pass).
        """
        plan = self._current()
        if self.objective.bypass or len(plan.updates) == 1:
            return
        with torch.no_grad():
            for number, micro_batches in enumerate(plan.mini_batches):
                for place, rows in enumerate(micro_batches):
                    batch = self._collate(rows)
                    logp, _ = self.engine(batch.input_ids, batch.selected, self.objective.temperature)
                    self._old_logp[number, place] = logp

    def forward_backward(self, update: int) -> None:
        """Accumulate the gradient of the mini-batch of update number `update` of the step. Collective."""
        plan = self._current()
        number = plan.updates[update]
        micro_batches = plan.mini_batches[number]
        self._loss = self._max_log_ratio = 0.0
        for place, rows in enumerate(micro_batches):
            batch = self._collate(rows)
            self.engine.set_gradient_accumulation_boundary(place == len(micro_batches) - 1)
            logp, entropy = self.engine(batch.input_ids, batch.selected, self.objective.temperature)
            old_logp = None if self.objective.bypass else self._old_logp.get((number, place), logp.detach())
            loss, stats = token_loss(
                self.objective,
                logp=logp,
                old_logp=old_logp,
                rollout_logp=batch.rollout_logp,
                advantages=batch.advantages,
                mask=batch.mask,
                loss_weights=batch.loss_weights,
                entropy=entropy,
                ages=batch.ages,
                groups=batch.groups,
            )
            self.engine.backward(loss * self.place.ranks, scale_wrt_gas=False)
            self._stats.merge(stats)
            self._loss += loss.item()
            self._note_ratio(logp, batch.rollout_logp if old_logp is None else old_logp, batch.mask)

    def optim_step(self, update: int) -> UpdateReport:
        """Apply the accumulated gradient, or skip it on every rank if it is not finite on any. Collective.

        Raises
            TrainingFailed: learner.max_nonfinite updates in a row were skipped; the batch is kept in a file
        """
        plan = self._current()
        loss = torch.tensor([self._loss], dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(loss)
        norm = gradient_norm(self.engine)
        finite = math.isfinite(norm) and math.isfinite(loss.item())
        lr = learning_rate(self.progress.steps * self.spec.updates_per_step + update, self.spec)
        if finite:
            for group in self.engine.basic_optimizer.param_groups:
                group["lr"] = lr
            self.engine.step()
            self.progress.nonfinite_in_row = 0
        else:
            clear_gradients(self.engine)
            self.progress.nonfinite_in_row += 1
            if self.progress.nonfinite_in_row >= self.spec.learner.max_nonfinite:
                self._fail(plan, update, loss.item(), norm)
        return UpdateReport(
            mini_batch=plan.updates[update],
            loss=loss.item(),
            grad_norm=norm,
            lr=lr,
            skipped=not finite,
            max_log_ratio=self._max_log_ratio,
        )

    def finish_step(self) -> TokenStats:
        """End the step; returns this rank's token statistics over all its updates."""
        self._plan, self._payloads, self._old_logp = None, (), {}
        self.progress.steps += 1
        return self._stats

    # -- weights and checkpoints ---------------------------------------------------------------------------------

    def set_canary(self, sequences: tuple[tuple[int, ...], ...]) -> None:
        """Sequences by which receivers of published weights are tested."""
        self.sender.canary_sequences = sequences

    def publish(self, version: PolicyVersion, receivers: Sequence[Any] = ()) -> Iterator[np.ndarray | WeightsManifest]:
        """Rank 0 yields each bucket and then the manifest; the other ranks yield nothing. Collective.

        With a native transport the weights are pushed into `receivers` (rollout actors) first.
        """
        native = bool(receivers) and self.place.transport != "shared_memory"
        if native:
            if self._push is None:
                from sapo_ray.learner.vllm_transport import NativePush

                self._push = NativePush(self.sender, self.place.transport, self.spec.rollout.tensor_parallel)
            self._push.push(receivers)
        yield from self.sender.publish(version, pushed=native)

    def save(self, folder: str) -> str:
        """Write model, optimizer, position in the schedule and random states into an existing folder. Collective.

        Returns what could not be written and why; empty if all was.
        """
        return checkpoint.save(self.engine, Path(folder), self.place, self.spec, self.progress)

    def load(self, folder: str) -> None:
        """Restore what save wrote, into a group that has not trained yet. Collective.

        Raises
            CheckpointError: it is missing, damaged, or of another model or ZeRO stage
        """
        self.progress = checkpoint.load(self.engine, Path(folder), self.place, self.spec)

    def peak_bytes(self) -> int:
        """Most bytes that publishing held at once beyond the shards."""
        return self.sender.peak_bytes

    # -- private -------------------------------------------------------------------------------------------------

    def _current(self) -> RankPlan:
        assert self._plan is not None, "load_batch comes first"
        return self._plan

    def _collate(self, rows: MicroBatch) -> Batch:
        return collate(rows, self._payloads, self.engine.device)

    def _note_ratio(self, logp: Tensor, reference: Tensor, mask: Tensor) -> None:
        if mask.any():
            difference = (logp.detach() - reference)[mask].abs().max().item()
            self._max_log_ratio = max(self._max_log_ratio, difference)

    def _fail(self, plan: RankPlan, update: int, loss: float, norm: float) -> None:
        """Keep this rank's part of the offending mini-batch and give up."""
        kept = keep_offending(Path(self.spec.run_dir or "."), plan, update, self._payloads, self.place.rank)
        raise TrainingFailed(
            f"step {plan.step}: {self.progress.nonfinite_in_row} updates in a row had a non-finite gradient "
            f"(learner.max_nonfinite: {self.spec.learner.max_nonfinite}; last loss {loss:g}, gradient norm {norm:g}); "
            f"{kept} and the weights are those before it; a lower learner.lr or algorithm.restoring may help"
        )
