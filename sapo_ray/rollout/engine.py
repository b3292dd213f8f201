"""How a job's settings become a vLLM engine: the arguments, the environment, and what its model should hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sapo_ray.config.spec import JobSpec

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

CPU_ENVIRONMENT = {
    # The engine is a process of its own in either mode; 0 keeps its one rank in it and binds no cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Otherwise the first request with log-probs compiles for seconds, even when eager.
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}


def actor_environment(spec: JobSpec, gpus: bool) -> dict[str, str]:
    """Environment of a rollout actor, which its engine's processes inherit."""
    environment = dict(ENVIRONMENT)
    if not gpus:
        environment |= CPU_ENVIRONMENT
    if spec.transport == "ipc":
        # CUDA IPC handles reach the engine's process pickled; they come from this job's own learner.
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return environment


def longest_sequence(spec: JobSpec, model_path: str) -> int:
    """Tokens, prompt and completion, of the longest sequence this job can ask for and the model can take."""
    new = max(spec.rollout.max_new_tokens, spec.evaluation.max_new_tokens or 0)
    config = _config(spec, model_path)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = spec.data.max_prompt_tokens + new
    return min(wanted, limit) if limit else wanted


def engine_arguments(spec: JobSpec, model_path: str) -> dict[str, Any]:
    """Keyword arguments of `AsyncEngineArgs`."""
    gpus = torch.cuda.is_available()
    arguments: dict[str, Any] = {
        "model": model_path,
        "revision": _revision(spec, model_path),
        "trust_remote_code": spec.model.trust_remote_code,
        "dtype": spec.rollout_dtype,
        "max_model_len": longest_sequence(spec, model_path),
        "max_num_seqs": spec.rollout.max_num_seqs,
        # Log-probs of the distribution that is sampled from: after the temperature.
        "logprobs_mode": "processed_logprobs",
        # A model's own sampling defaults are never taken; its end-of-sequence tokens are.
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        # The canary goes before everything that waits when an update ends.
        "scheduling_policy": "priority",
        "seed": 0,
        "disable_log_stats": True,
        "worker_extension_cls": "sapo_ray.rollout.weight_engine.Attestation",
        "weight_transfer_config": {"backend": f"sapo_{spec.transport}"},
    }
    if gpus:
        arguments |= {
            "tensor_parallel_size": spec.rollout.tensor_parallel,
            "gpu_memory_utilization": spec.rollout.gpu_memory_utilization,
            "enforce_eager": spec.rollout.enforce_eager,
        }
    else:
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": spec.rollout.kv_cache_mb << 20}
    return arguments


def build_engine(spec: JobSpec, model_path: str) -> AsyncLLM:
    """Start an engine: blocks for seconds to minutes. Call it within the event loop that will use it."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(spec, model_path)))


def expected_parameters(spec: JobSpec, model_path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything a learner of this model publishes, from the model's definition alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            _config(spec, model_path), trust_remote_code=spec.model.trust_remote_code
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def tokenizer_of(spec: JobSpec, model_path: str) -> Any:
    """The model's tokenizer, to decode with."""
    return AutoTokenizer.from_pretrained(
        model_path, revision=_revision(spec, model_path), trust_remote_code=spec.model.trust_remote_code
    )


def _config(spec: JobSpec, model_path: str) -> Any:
    return AutoConfig.from_pretrained(
        model_path, revision=_revision(spec, model_path), trust_remote_code=spec.model.trust_remote_code
    )


def _revision(spec: JobSpec, model_path: str) -> str | None:
    """Only models of the Hub have one."""
    return None if Path(model_path).is_dir() else spec.model.revision
