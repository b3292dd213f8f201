"""The warm start reaches its aim: a policy that is right now and then."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sapo_ray.config.spec import ModelSpec
from sapo_ray.data import addition
from sapo_ray.models.prepare import prepare_model
from sapo_ray.models.tokenizer import load_tokenizer
from sapo_ray.models.warm_start import measure_accuracy, warm_start


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_warm_started_model_knows_the_form_but_seldom_the_sum(seed: int, tmp_path: Path) -> None:
    spec = ModelSpec(path="builtin:addition", dtype="float32", warm_start_accuracy=0.15)
    steps: list[int] = []
    folder = prepare_model(spec, tmp_path / "model", seed, lambda step, loss, accuracy: steps.append(step))
    report = warm_start(folder, 0.15, seed)  # done already: the report of it
    assert report.steps == steps[-1] >= 200
    assert report.accuracy >= 0.15
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    heldout = addition.heldout_pairs()
    assert measure_accuracy(model, tokenizer, heldout, temperature=0) < 0.45
    assert 0.10 <= measure_accuracy(model, tokenizer, heldout, temperature=1.0) <= 0.32
