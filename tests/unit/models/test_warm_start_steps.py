"""Warm start, a few steps of it; that it reaches its aim is an integration test."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sapo_ray.config.spec import ModelSpec
from sapo_ray.data import addition
from sapo_ray.errors import ModelError
from sapo_ray.models.builtin import make_addition_model
from sapo_ray.models.prepare import prepare_model
from sapo_ray.models.tokenizer import load_tokenizer
from sapo_ray.models.warm_start import complete, measure_accuracy, warm_start


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("addition")
    make_addition_model(folder, seed=0)
    return folder


def _copy(untrained: Path, to: Path) -> Path:
    shutil.copytree(untrained, to)
    return to


def test_the_same_seed_gives_the_same_weights_whatever_the_threads(untrained: Path, tmp_path: Path) -> None:
    weights = {}
    threads = torch.get_num_threads()
    for name, seed, torch_threads in (("a", 3, 1), ("b", 3, 2), ("c", 4, 1)):
        torch.set_num_threads(torch_threads)
        try:
            warm_start(_copy(untrained, tmp_path / name), 0.0, seed, max_steps=3)
            assert torch.get_num_threads() == torch_threads
        finally:
            torch.set_num_threads(threads)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]


def test_a_warm_started_model_is_left_as_it_is(untrained: Path, tmp_path: Path) -> None:
    folder = _copy(untrained, tmp_path / "a")
    first = warm_start(folder, 0.0, 0, max_steps=2)
    written = (folder / "model.safetensors").read_bytes()
    assert warm_start(folder, 0.0, 0, max_steps=5) == first
    assert (folder / "model.safetensors").read_bytes() == written


def test_an_accuracy_out_of_reach_is_an_error_and_leaves_the_model_as_it_was(untrained: Path, tmp_path: Path) -> None:
    folder = _copy(untrained, tmp_path / "a")
    calls: list[tuple[int, float, float]] = []
    with pytest.raises(ModelError) as raised:
        warm_start(folder, 0.9, 0, lambda *progress: calls.append(progress), max_steps=3)
    assert "reached a sampled accuracy of 0.000 within 3 steps, model.warm_start_accuracy asks for 0.9;" in str(
        raised.value
    )
    [(step, loss, accuracy)] = calls
    assert (step, accuracy) == (3, 0.0)
    assert 3.5 < loss < 6  # near log(99) = 4.6, not yet learnt
    assert (folder / "model.safetensors").read_bytes() == (untrained / "model.safetensors").read_bytes()


def test_preparing_with_a_warm_start_out_of_reach_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sapo_ray.models.prepare.warm_start", partial(warm_start, max_steps=1))
    spec = ModelSpec(path="builtin:addition", warm_start_accuracy=1.0)
    with pytest.raises(ModelError, match="asks for 1"):
        prepare_model(spec, tmp_path / "model", seed=0)
    assert list(tmp_path.iterdir()) == []


class _Oracle(torch.nn.Module):
    """Answers sums from a table, rightly for even left operands: a model whose accuracy is known."""

    def __init__(self, tokenizer: object, config: object) -> None:
        super().__init__()
        self.config = config
        self._tokenizer = tokenizer
        self._scripts: list[list[int]] = []
        self._at = 0

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        if input_ids.shape[1] > 1:
            self._at = 0
            self._scripts = [self._script(text) for text in self._tokenizer.batch_decode(input_ids)]
        logits = torch.full((len(input_ids), 1, 99), -100.0)
        for row, script in enumerate(self._scripts):
            logits[row, 0, script[min(self._at, len(script) - 1)]] = 100.0
        self._at += 1
        return type("Output", (), {"logits": logits})()

    def _script(self, prompt: str) -> list[int]:
        a, b = map(int, prompt.rstrip("=").split("+"))
        working = addition.right_working(a, b if a % 2 == 0 else b + 1)
        return [*self._tokenizer(working)["input_ids"], self._tokenizer.eos_token_id]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accuracy_counts_right_last_boxes(temperature: float, untrained: Path) -> None:
    tokenizer = load_tokenizer(untrained)
    oracle = _Oracle(tokenizer, AutoModelForCausalLM.from_pretrained(untrained).config)
    pairs = [(10, 20), (11, 20), (12, 30), (98, 99)]
    assert measure_accuracy(oracle, tokenizer, pairs, temperature=temperature) == 0.75


def test_greedy_answers_are_those_ofcomplete(untrained: Path) -> None:
    """Our own decoding with a cache against the library's."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(untrained), load_tokenizer(untrained)
    prompts = torch.tensor(tokenizer([addition.prompt(a, b) for a, b in addition.heldout_pairs()[:8]])["input_ids"])
    ours = complete(model, prompts, 0.0, 0, tokenizer.eos_token_id)
    theirs = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=28,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    assert ours.tolist() == theirs[:, 6:].tolist()
