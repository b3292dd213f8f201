"""What is wrong with a job, in words: the key, its value, the bound, the way out."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sapo_ray.config.keys import Key, Location, all_keys, dotted, key_at, names_at

MOST_PROBLEMS = 50
"""That one message lists; it says how many more there are."""
MOST_SUGGESTIONS = 20
"""What was meant is looked for so many times: each look compares a name with all that there are."""

# What other trainers call it -> the key here.
FAMILIAR = {
    "learning_rate": "learner.lr",
    "max_steps": "steps",
    "num_generations": "rollout.group_size",
    "n_samples": "rollout.group_size",
    "batch_size": "rollout.prompts_per_step",
    "rollout_batch_size": "rollout.prompts_per_step",
    "num_workers": "rollout.workers",
    "max_completion_length": "rollout.max_new_tokens",
    "max_tokens": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_grad_norm": "learner.grad_clip",
    "lr_scheduler_type": "learner.schedule",
    "num_iterations": "learner.epochs",
    "model_name_or_path": "model.path",
    "sapo_temperature_pos": "algorithm.tau_pos",
    "sapo_temperature_neg": "algorithm.tau_neg",
    "loss_type": "algorithm.loss",
    "output_dir": "run_dir",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluation.every",
    "bf16": "model.dtype",
    "actor_lr": "learner.lr",
    "adam_epsilon": "learner.eps",
    "adv_estimator": "algorithm.advantage",
    "async_level": "rollout.max_staleness",
    "clip_range": "algorithm.eps_low",
    "clip_ratio": "algorithm.eps_low",
    "clip_ratio_low": "algorithm.eps_low",
    "clip_ratio_high": "algorithm.eps_high",
    "clip_ratio_c": "algorithm.dual_clip",
    "cliprange": "algorithm.eps_low",
    "dataset_name": "data.train.0.path",
    "delta": "algorithm.dual_clip",
    "epsilon": "algorithm.eps_low",
    "epsilon_high": "algorithm.eps_high",
    "gradient_accumulation_steps": "learner.tokens_per_micro_batch",
    "group_n": "rollout.group_size",
    "loss_agg_mode": "algorithm.aggregation",
    "mask_truncated_completions": "algorithm.mask_truncated",
    "max_off_policy_steps": "rollout.max_staleness",
    "max_response_length": "rollout.max_new_tokens",
    "micro_batch_size": "learner.tokens_per_micro_batch",
    "n_samples_per_prompt": "rollout.group_size",
    "num_generations_per_prompt": "rollout.group_size",
    "num_train_epochs": "steps",
    "overlong_buffer_len": "algorithm.overlong_buffer",
    "per_device_train_batch_size": "learner.tokens_per_micro_batch",
    "ppo_epochs": "learner.epochs",
    "ppo_max_token_len_per_gpu": "learner.tokens_per_micro_batch",
    "ppo_mini_batch_size": "learner.mini_batches",
    "project_name": "logging.wandb_project",
    "report_to": "logging.wandb_project",
    "reward_funcs": "verifier.reward",
    "reward_function": "verifier.reward",
    "rollout_n": "rollout.group_size",
    "save_freq": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "scale_rewards": "algorithm.advantage",
    "tensor_model_parallel_size": "rollout.tensor_parallel",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "test_freq": "evaluation.every",
    "total_epochs": "steps",
    "total_training_steps": "steps",
    "train_batch_size": "rollout.prompts_per_step",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_importance_sampling_cap": "algorithm.correction_cap",
    "warmup_steps": "learner.warmup_updates",
}

_NO_KL = "there is no KL penalty and no reference model here: the gate keeps updates close (docs/algorithm.md)"
_WHOLE = "training samples from the whole distribution, so that log-probs of learner and sampler mean the same"
# What other trainers have and this one does not, with the reason.
ABSENT = {
    "beta": f"{_NO_KL}; remove it (AdamW's two are learner.betas)",
    "kl_beta": f"{_NO_KL}; remove it",
    "kl_coef": f"{_NO_KL}; remove it",
    "kl_loss_coef": f"{_NO_KL}; remove it",
    "kl_ctrl": f"{_NO_KL}; remove it",
    "use_kl_loss": f"{_NO_KL}; remove it",
    "init_kl_coef": f"{_NO_KL}; remove it",
    "ref_model": f"{_NO_KL}; remove it",
    "top_k": f"{_WHOLE}; remove it",
    "min_p": f"{_WHOLE}; remove it",
    "repetition_penalty": f"{_WHOLE}; remove it",
    "presence_penalty": f"{_WHOLE}; remove it",
    "frequency_penalty": f"{_WHOLE}; remove it",
}

_EXAMPLES = {
    "model": "add `model: {path: ...}`",
    "data": "add `data: {train: [{path: ...}]}`",
    "data.train": "add `train: [{path: ...}]` to data",
}

_EXAMPLE = """prompt: "{question}\""""
_COMPARED = {"greater_than_equal": ">=", "greater_than": ">", "less_than_equal": "<=", "less_than": "<"}
_LIMIT = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
_WRONG_TYPE = {
    "int_type", "int_parsing", "int_from_float", "int_parsing_size", "float_type", "float_parsing", "finite_number",
    "bool_type", "bool_parsing", "string_type", "tuple_type", "bool_for_a_number",
}  # fmt: skip


def describe(error: ValidationError, *, ignore_missing: bool = False) -> list[str]:
    """One message per problem, in the order of the job; missing keys are left out where the preset is unknown.

    The first MOST_PROBLEMS, and how many more there are.
    """
    found = [one for one in error.errors(include_url=False) if not (ignore_missing and one["type"] == "missing")]
    lines: list[str] = []
    for number, problem in enumerate(found[:MOST_PROBLEMS]):
        lines += _describe(problem, suggest=number < MOST_SUGGESTIONS)
    if len(found) > MOST_PROBLEMS:
        lines.append(f"{len(found) - MOST_PROBLEMS} more problems are not listed; correct these first")
    return lines


def unknown_key(location: Location) -> str:
    """`rollout.worker is not a key; did you mean rollout.workers?`, else where such a key lives, else what there is."""
    name, section = str(location[-1]), tuple(location[:-1])
    if name in ABSENT:
        return f"{dotted(location)} is not a key; {ABSENT[name]}"
    siblings = names_at(section)

    def sibling(cutoff: float) -> str | None:
        near = difflib.get_close_matches(name, siblings, n=1, cutoff=cutoff)
        return dotted((*section, near[0])) if near else None

    meant = sibling(0.75) or FAMILIAR.get(name) or sibling(0.6) or _anywhere(name)
    if meant:
        return f"{dotted(location)} is not a key; did you mean {meant}?"
    return f"{dotted(location)} is not a key; {_what_there_is(section)}"


def _what_there_is(section: Location) -> str:
    return f"{dotted(section) or 'a job'} has: {', '.join(names_at(section))}"


def _anywhere(name: str) -> str | None:
    """The key of any section whose last name is nearest; the first of equals in the order of the job."""
    by_leaf: dict[str, str] = {}
    for key in all_keys():
        by_leaf.setdefault(key.rsplit(".", 1)[-1], key.replace("[]", ".0"))
    near = difflib.get_close_matches(name, by_leaf, n=1, cutoff=0.75)
    return by_leaf[near[0]] if near else None


def _describe(problem: ErrorDetails, *, suggest: bool) -> list[str]:
    location, kind, value = problem["loc"], problem["type"], problem["input"]
    context: dict[str, Any] = problem.get("ctx") or {}
    key = key_at(location)
    name = dotted(location)
    if kind == "extra_forbidden":
        return [unknown_key(location) if suggest else f"{name} is not a key"]
    if kind == "missing":
        return [_missing(location, key)]
    if kind == "value_error":  # our own validators, which name their keys
        return str(context["error"]).splitlines()
    if kind == "invalid_key":
        return [f"{name} is not a key; {_what_there_is(location[:-1])}"]
    if kind in _COMPARED:
        bound = f"{_COMPARED[kind]} {context[_LIMIT[kind]]:g}"
        return [f"{name} must be {bound}, got {_shown(value)}; {_remedy(key)}"]
    if kind == "literal_error" and key is not None:
        return [
            f"{name} must be {key.kind}, got {_shown(value)}{_nearest(value, key) if suggest else ''}; {_remedy(key)}"
        ]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [_not_a_section(location, value)]
    if kind in ("list_type", "too_short") and key is None:
        return [
            f"{name} must be a list of at least one entry, got {_shown(value)}; each entry begins with `- path: ...`"
        ]
    if kind == "string_pattern_mismatch" and name.startswith("secrets."):
        return [f"{name} must be capitals, digits and underscores, as HF_TOKEN is, got {_shown(value)}"]
    if kind in ("too_short", "too_long", "missing", "list_type") or (kind in _WRONG_TYPE and key is not None):
        return [_wrong_type(location, key, value)]
    return [f"{name}: {problem['msg']}, got {_shown(value)}" + (f"; {_remedy(key)}" if key else "")]


def _missing(location: Location, key: Key | None) -> str:
    if key is not None:
        return f"{dotted(location)} is missing; add it: {key.doc}"
    name = dotted(location)
    return f"{name} is missing; {_EXAMPLES.get(name, 'add it')}, or start from `preset: quickstart`"


def _not_a_section(location: Location, value: Any) -> str:
    names = ", ".join(names_at(location)[:4])
    if value is None:
        return f"{dotted(location)} is empty; indent its keys beneath it ({names}, ...) or remove the line"
    where = dotted(location) or "a job"
    return f"{where} must hold keys ({names}, ...), got {_shown(value)}"


def _wrong_type(location: Location, key: Key | None, value: Any) -> str:
    name = dotted(location)
    assert key is not None, name
    kind = key.kind.removesuffix("s").rsplit(" ", 1)[-1] if isinstance(location[-1], int) else key.kind  # of a list
    article = "" if kind in ("text", "true or false") else "a "
    hint = "put it in quotes" if key.text and isinstance(value, int | float | bool) else _remedy(key)
    if key.text and isinstance(value, dict | list):
        hint = f"text that begins with {'{' if isinstance(value, dict) else '['} must stand in quotes, e.g. {_EXAMPLE}"
    if value is None:
        hint = f"remove the line to have the default, {key.default}" if key.default else "give it a value"
    return f"{name} must be {article}{kind}{f' {key.bounds}' if key.bounds else ''}, got {_shown(value)}; {hint}"


def _remedy(key: Key | None) -> str:
    """The default, and what the key means: enough to choose a value without opening the manual."""
    if key is None:
        return "see docs/jobs.md"
    return key.doc + (f" Default: {key.default}." if key.default not in ("", "null") else "")


def _nearest(value: Any, key: Key) -> str:
    near = difflib.get_close_matches(str(value)[:100], key.choices, n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _shown(value: Any) -> str:
    text = "nothing (null)" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
