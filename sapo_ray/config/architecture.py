"""Sizes of decoder-only transformers from their Hugging Face configuration: arithmetic, no weights and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_ray.config.spec import ModelSpec
from sapo_ray.errors import ConfigError

_EXACT = {"qwen2", "qwen3", "llama", "mistral"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The numbers that decide parameters and memory."""

    model_type: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    """Embedding and language-model head are one tensor."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read a `config.json`.

        Raises:
            ConfigError: a number is missing, or the model is a mixture of experts, which is not estimated.
        """
        kind = str(config.get("model_type", "unknown"))
        if any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
            raise ConfigError(f"model of type {kind!r} is a mixture of experts; its memory cannot be estimated")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in needed if not isinstance(config.get(key), int)]
        if missing:
            raise ConfigError(
                f"model configuration of type {kind!r} lacks {', '.join(missing)}; "
                "a decoder-only model's config.json has them"
            )
        heads, bias = config["num_attention_heads"], bool(config.get("attention_bias"))
        return cls(
            model_type=kind,
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tied=bool(config.get("tie_word_embeddings")),
            qkv_bias=kind == "qwen2" or bias,
            o_bias=kind != "qwen2" and bias,
            mlp_bias=bool(config.get("mlp_bias")),
            qk_norm=kind == "qwen3",
        )

    @property
    def exact(self) -> bool:
        """The layer layout of this model type is known; others are counted as LLaMA's."""
        return self.model_type in _EXACT

    @property
    def layer_parameters(self) -> int:
        """Of one transformer layer."""
        q, kv, h, i = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        attention = h * (q + 2 * kv) + q * h + self.qkv_bias * (q + 2 * kv) + self.o_bias * h
        mlp = 3 * h * i + self.mlp_bias * (2 * i + h)
        return attention + mlp + 2 * h + self.qk_norm * 2 * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Of one embedding table, usually the largest tensor."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model, a tied head counted once."""
        tables = 1 if self.tied else 2
        return tables * self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def largest_tensor(self) -> int:
        """Elements of the largest single tensor."""
        return max(self.embedding_parameters, self.hidden * self.intermediate, self.hidden * self.heads * self.head_dim)

    @property
    def kv_elements(self) -> int:
        """Elements of keys and values that one token occupies, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def find_architecture(model: ModelSpec) -> dict[str, Any] | None:
    """Configuration of a job's model as far as it is known without network: builtin, a local folder, or a known id.

    Raises:
        ConfigError: a local folder whose config.json is missing or not JSON.
    """
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path {model.path!r}: config.json cannot be read ({error})") from None
        return config
    name = model.path.rsplit("/", 1)[-1].removesuffix("-Instruct").removesuffix("-Base")
    row = _KNOWN.get(name)
    return dict(zip(_COLUMNS, row, strict=True)) if row else None


_COLUMNS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
_KNOWN: dict[str, tuple[str, int, int, int, int, int, int, int, bool]] = {
    "builtin:addition": ("qwen2", 99, 64, 256, 2, 2, 2, 32, True),
    "builtin:bytes": ("qwen2", 259, 64, 256, 2, 2, 2, 32, True),
    "Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "Qwen2.5-3B": ("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True),
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "Qwen2.5-14B": ("qwen2", 152064, 5120, 13824, 48, 40, 8, 128, False),
    "Qwen2.5-32B": ("qwen2", 152064, 5120, 27648, 64, 40, 8, 128, False),
    "Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "Qwen3-1.7B": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "Qwen3-4B": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "Llama-3.2-3B": ("llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
}
