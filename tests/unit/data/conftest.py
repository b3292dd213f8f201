"""Tokenizers of the tiny models, made once a session."""

from __future__ import annotations

from typing import Any

import pytest

from sapo_ray.models.builtin import make_addition_model, make_bytes_model
from sapo_ray.models.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def addition_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("addition")
    make_addition_model(folder, seed=0)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bytes")
    make_bytes_model(folder, seed=0)
    return load_tokenizer(folder)
