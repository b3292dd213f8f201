"""The inputs of a job, found good before any engine starts: model, tokenizer, prompts, reference answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sapo_ray.config.spec import JobSpec, SourceSpec
from sapo_ray.data.prompts import PromptSource, evaluation_prompts
from sapo_ray.data.sources import load_rows
from sapo_ray.errors import ConfigError, DataError
from sapo_ray.models.prepare import prepare_model
from sapo_ray.models.tokenizer import load_tokenizer
from sapo_ray.types import Prompt
from sapo_ray.verifier.golds import check_gold, check_reward

log = logging.getLogger(__name__)

CANARY_SEQUENCES = 4
CANARY_TOKENS = 256
SHOWN = 3
"""Unusable references named in an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a run needs before it starts engines."""

    model_path: Path
    prompts: PromptSource
    evaluation: list[Prompt]
    canary: tuple[tuple[int, ...], ...]
    """The first prompts of the job, cut to a bounded length: fixed for the run and of the real distribution."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationInputs:
    """What an evaluation alone needs: no training data."""

    model_path: Path
    evaluation: list[Prompt]
    canary: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class References:
    """Rows that cannot be graded against, of each source in the order of the job."""

    train: list[frozenset[int]]
    evaluation: list[frozenset[int]]


OnWarmStart = Callable[[int, float, float], None]
"""Called with step, loss and accuracy."""


def prepare_inputs(spec: JobSpec, model_folder: Path, on_warm_start: OnWarmStart | None = None) -> Inputs:
    """Load or make everything a job names.

    Raises:
        ModelError, DataError, ConfigError: whatever is wrong with the inputs, naming key, file and row.
    """
    began = time.monotonic()
    references = check_references(spec)
    model_path, tokenizer = _model(spec, model_folder, on_warm_start)
    prompts = PromptSource(spec.data, tokenizer, spec.seed, references.train)
    start = prompts.state()
    canary = tuple(prompts.take().token_ids[:CANARY_TOKENS] for _ in range(CANARY_SEQUENCES))
    prompts.restore(start)
    return Inputs(
        model_path=model_path,
        prompts=prompts,
        evaluation=_evaluation(spec, tokenizer, references.evaluation),
        canary=canary,
        seconds=time.monotonic() - began,
    )


def prepare_evaluation(spec: JobSpec, model_folder: Path, on_warm_start: OnWarmStart | None = None) -> EvaluationInputs:
    """The model and the held-out prompts; the training data is not opened, and need not be there.

    Raises: as prepare_inputs.
    """
    unusable = [_unusable(source, spec) for source in spec.evaluation.data]
    if spec.verifier.reward is not None:
        check_reward(spec.verifier)
    model_path, tokenizer = _model(spec, model_folder, on_warm_start)
    prompts = _evaluation(spec, tokenizer, unusable)
    canary = tuple(prompt.token_ids[:CANARY_TOKENS] for prompt in prompts[:CANARY_SEQUENCES])
    return EvaluationInputs(model_path=model_path, evaluation=prompts, canary=canary)


def _model(spec: JobSpec, model_folder: Path, on_warm_start: OnWarmStart | None) -> tuple[Path, Any]:
    """Folder and tokenizer of the model, found to have room for the job's prompts and completions."""
    model_path = prepare_model(spec.model, model_folder, spec.seed, on_warm_start)
    check_positions(spec, model_path)
    return model_path, load_tokenizer(model_path, trust_remote_code=spec.model.trust_remote_code)


def _evaluation(spec: JobSpec, tokenizer: Any, unusable: list[frozenset[int]]) -> list[Prompt]:
    if not spec.evaluation.data:
        return []
    return evaluation_prompts(spec.evaluation.data, spec.data, tokenizer, spec.evaluation.limit, unusable)


def check_positions(spec: JobSpec, model_path: Path) -> None:
    """Raise ConfigError if the longest prompt and completion the job allows do not fit into the model."""
    config = AutoConfig.from_pretrained(
        str(model_path), trust_remote_code=spec.model.trust_remote_code, local_files_only=True
    )
    bound = getattr(config.get_text_config(), "max_position_embeddings", None)
    key, new = "rollout.max_new_tokens", spec.rollout.max_new_tokens
    if (spec.evaluation.max_new_tokens or 0) > new:
        key, new = "evaluation.max_new_tokens", spec.evaluation.max_new_tokens or 0
    if bound is not None and spec.data.max_prompt_tokens + new > bound:
        raise ConfigError(
            f"data.max_prompt_tokens + {key} must be <= {bound}, the max_position_embeddings of {spec.model.path}, got "
            f"{spec.data.max_prompt_tokens} + {new} = {spec.data.max_prompt_tokens + new}; lower either, or take a "
            "model with more positions"
        )


def check_references(spec: JobSpec) -> References:
    """What answers are graded with works.

    Raises:
        ConfigError: `verifier.reward` cannot be used.
        DataError: a reference answer cannot be graded against, and `data.unusable_gold` is `error`.
    """
    if spec.verifier.reward is not None:
        check_reward(spec.verifier)
    return References(
        train=[_unusable(source, spec) for source in spec.data.train],
        evaluation=[_unusable(source, spec) for source in spec.evaluation.data],
    )


def _unusable(source: SourceSpec, spec: JobSpec) -> frozenset[int]:
    if spec.verifier.reward is not None or source.path.startswith("builtin:"):
        return frozenset()  # read by the reward function alone; made by rule, and checked by their tests
    rows = load_rows(source)
    unusable = check_gold(rows.golds, spec.verifier)
    if unusable:
        named = "; ".join(f"{rows.places[row]}: {rows.golds[row][:80]!r}" for row in unusable[:SHOWN])
        more = f" and {len(unusable) - SHOWN} more" if len(unusable) > SHOWN else ""
        found = f"{len(unusable)} of {len(rows)} reference answers of {source.path} cannot be parsed: {named}{more}"
        if spec.data.unusable_gold == "error":
            raise DataError(
                f"{found}; set data.unusable_gold: skip to leave these rows out, mend them, set gold to where the "
                "answer stands, or use a verifier.reward of your own"
            )
        log.warning("%s; these rows are left out (data.unusable_gold: skip)", found)
    return frozenset(unusable)
