"""The tiny models as any user of transformers finds them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sapo_ray.data import addition
from sapo_ray.models.builtin import make_addition_model, make_bytes_model

MAKE = {"addition": make_addition_model, "bytes": make_bytes_model}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in MAKE}
    for name, folder in made.items():
        MAKE[name](folder, seed=0)
    return made


@pytest.mark.parametrize(("name", "parameters", "vocabulary"), [("addition", 138_112, 99), ("bytes", 148_352, 259)])
def test_the_models_have_the_promised_size(
    name: str, parameters: int, vocabulary: int, folders: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    assert (model.num_parameters(), len(tokenizer), model.config.vocab_size) == (parameters, vocabulary, vocabulary)
    assert model.dtype == torch.float32
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_are_drawn_with_a_standard_deviation_of_a_sixteenth(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["addition"])
    deviation = model.model.layers[0].mlp.gate_proj.weight.std().item()
    assert deviation == pytest.approx(0.5 / 8, rel=0.03)


@pytest.mark.parametrize("name", MAKE)
def test_special_ids_agree_between_model_and_tokenizer_and_nothing_says_how_to_sample(
    name: str, folders: dict[str, Path]
) -> None:
    generation = json.loads((folders[name] / "generation_config.json").read_text())
    generation.pop("transformers_version")
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    assert generation == ids
    assert sorted(ids.values()) == [0, 1, 2]
    config = json.loads((folders[name] / "config.json").read_text())
    assert {key: config[key] for key in ids} == ids


@pytest.mark.parametrize("load", [AutoTokenizer, PreTrainedTokenizerFast])
@pytest.mark.parametrize("name", MAKE)
def test_every_printable_character_is_one_token_and_comes_back(name: str, load: Any, folders: dict[str, Path]) -> None:
    tokenizer = load.from_pretrained(folders[name])
    printable = "".join(character for character in string.printable if character.isprintable())
    assert len(printable) == 95
    for character in printable:
        ids = tokenizer(character)["input_ids"]
        assert (len(ids), tokenizer.decode(ids)) == (1, character)
    ids = tokenizer(printable)["input_ids"]
    assert len(set(ids)) == 95
    assert tokenizer.decode(ids) == printable


@pytest.mark.parametrize("load", [AutoTokenizer, PreTrainedTokenizerFast])
def test_boxed_is_one_token_of_the_addition_model(load: Any, folders: dict[str, Path]) -> None:
    tokenizer = load.from_pretrained(folders["addition"])
    ids = tokenizer(r"\boxed{42}")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["\\boxed{", "4", "2", "}"]
    working = addition.right_working(17, 25)
    ids = tokenizer(working)["input_ids"]
    assert len(ids) == 19
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == working
    assert tokenizer.convert_ids_to_tokens(tokenizer(r"\box{")["input_ids"]) == ["\\", "b", "o", "x", "{"]


def test_any_text_goes_through_the_bytes_model_unchanged(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["bytes"])
    text = "a  b\t\n\n¿Qué? ∑ 数学 😀 \x00\x7f\r\n"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(1).item()
    torch.manual_seed(123)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_addition_model(tmp_path / name, seed)
    assert torch.rand(1).item() == expected
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
