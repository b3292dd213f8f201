"""Loading tokenizers, with errors that say what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sapo_ray.errors import ModelError

_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tokenization*.py", "tekken.json")
"""Any of these holds a vocabulary, or code that makes one."""


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in the model folder `path`.

    Raises:
        ModelError: there is none, it cannot be read, or it has no end-of-sequence token.
    """
    # Without files, transformers makes up an empty tokenizer of the model's usual class, and says nothing.
    if not any(next(Path(path).glob(pattern), None) for pattern in _FILES):
        raise _missing(path, "no tokenizer file is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        # transformers raises almost anything here, depending on which file is missing or damaged.
        raise _missing(path, _first_line(error)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path {str(path)!r}: the tokenizer has no end-of-sequence token, so completions could never end; "
            "set eos_token in tokenizer_config.json"
        )
    return tokenizer


def _missing(path: str | Path, reason: str) -> ModelError:
    return ModelError(
        f"model.path {str(path)!r}: no tokenizer could be loaded ({reason}); the folder needs "
        "tokenizer.json and tokenizer_config.json: save them there with tokenizer.save_pretrained(folder)"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
