"""The stream of prompts: order, restoring, lengths, fingerprint."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sapo_ray.config.spec import DataSpec, SourceSpec
from sapo_ray.data.prompts import PromptSource, evaluation_prompts
from sapo_ray.errors import CheckpointError, ConfigError, DataError


def _file(path: Path, questions: list[str]) -> str:
    rows = [json.dumps({"question": question, "answer": str(n)}) for n, question in enumerate(questions)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def _data(*sources: dict[str, Any], **settings: Any) -> DataSpec:
    return DataSpec.model_validate({"train": list(sources), "template": "plain", **settings})


@pytest.fixture
def mixed(tmp_path: Path) -> DataSpec:
    """Sources of 7 and 20 rows, three takes of the second to one of the first."""
    few = _file(tmp_path / "few.jsonl", [f"a{n}" for n in range(7)])
    many = _file(tmp_path / "many.jsonl", [f"b{n}" for n in range(20)])
    return _data({"path": few}, {"path": many, "weight": 3})


def test_a_prompt_says_where_it_came_from(tmp_path: Path, addition_tokenizer: Any) -> None:
    data = _data({"path": _file(tmp_path / "sums.jsonl", ["1+1=", "2+2="])}, shuffle=False)
    source = PromptSource(data, addition_tokenizer, seed=0)
    prompts = [source.take() for _ in range(3)]
    assert [(p.id, p.index, p.source, p.text, p.gold) for p in prompts] == [
        ("sums:0:0", 0, "sums", "1+1=", "0"),
        ("sums:1:0", 1, "sums", "2+2=", "1"),
        ("sums:0:1", 2, "sums", "1+1=", "0"),
    ]
    assert addition_tokenizer.decode(prompts[0].token_ids) == "1+1="


def test_sources_are_mixed_by_weight(mixed: DataSpec, addition_tokenizer: Any) -> None:
    source = PromptSource(mixed, addition_tokenizer, seed=0)
    assert len(source) == 27
    counts = Counter(source.take().source for _ in range(10_000))
    assert counts == {"few": 2500, "many": 7500}


def test_every_row_comes_exactly_once_per_epoch_of_its_source(mixed: DataSpec, addition_tokenizer: Any) -> None:
    source = PromptSource(mixed, addition_tokenizer, seed=0)
    taken = [source.take().id for _ in range(4 * 70)]
    few = [prompt_id for prompt_id in taken if prompt_id.startswith("few")]
    many = [prompt_id for prompt_id in taken if prompt_id.startswith("many")]
    assert len(set(taken)) == 280
    for epoch in range(10):
        assert sorted(few[7 * epoch : 7 * epoch + 7]) == [f"few:{row}:{epoch}" for row in range(7)]
    for epoch in range(10):
        rows = many[20 * epoch : 20 * epoch + 20]
        assert sorted(rows) == sorted(f"many:{row}:{epoch}" for row in range(20))
    assert [prompt_id[:-2] for prompt_id in many[:20]] != [prompt_id[:-2] for prompt_id in many[20:40]]


def test_the_order_is_decided_by_the_seed(mixed: DataSpec, addition_tokenizer: Any) -> None:
    def order(seed: int) -> list[str]:
        source = PromptSource(mixed, addition_tokenizer, seed)
        return [source.take().id for _ in range(50)]

    assert order(3) == order(3)
    assert order(3) != order(4)


@pytest.mark.parametrize("takes", [0, 1, 27, 100])
def test_a_restored_stream_goes_on_as_if_never_interrupted(
    takes: int, mixed: DataSpec, addition_tokenizer: Any
) -> None:
    uninterrupted = PromptSource(mixed, addition_tokenizer, seed=5)
    for _ in range(takes):
        uninterrupted.take()
    state = json.loads(json.dumps(uninterrupted.state()))
    restored = PromptSource(mixed, addition_tokenizer, seed=5)
    restored.restore(state)
    assert [restored.take() for _ in range(60)] == [uninterrupted.take() for _ in range(60)]


def test_the_state_is_one_number_per_source(mixed: DataSpec, addition_tokenizer: Any) -> None:
    source = PromptSource(mixed, addition_tokenizer, seed=0)
    for _ in range(1000):
        source.take()
    assert source.state() == {"fingerprint": source.fingerprint, "taken": {"few": 250, "many": 750}}


def test_a_state_of_other_data_is_refused(tmp_path: Path, addition_tokenizer: Any) -> None:
    def make(*questions: str, **settings: Any) -> PromptSource:
        data = _data({"path": _file(tmp_path / "sums.jsonl", list(questions))}, **settings)
        return PromptSource(data, addition_tokenizer, seed=0)

    state = make("1+1=", "2+2=").state()
    make("1+1=", "2+2=").restore(state)
    for other in (make("1+1=", "2+3="), make("2+2=", "1+1="), make("1+1=", "2+2=", prompt="{question} ")):
        with pytest.raises(CheckpointError, match="the checkpoint was made with other training data: fingerprint"):
            other.restore(state)


def test_the_fingerprint_depends_on_all_that_decides_prompts(
    tmp_path: Path, addition_tokenizer: Any, bytes_tokenizer: Any
) -> None:
    path = _file(tmp_path / "sums.jsonl", ["1+1=", "2+2="])

    def fingerprint(seed: int = 0, tokenizer: Any = addition_tokenizer, weight: float = 1, **settings: Any) -> str:
        data = _data({"path": path, "weight": weight}, {"path": "builtin:addition"}, **settings)
        return PromptSource(data, tokenizer, seed).fingerprint

    same = [fingerprint(), fingerprint()]
    others = [
        fingerprint(seed=1),
        fingerprint(tokenizer=bytes_tokenizer),
        fingerprint(tokenizer=bytes_tokenizer, template="chat"),
        fingerprint(weight=2),
        fingerprint(shuffle=False),
        fingerprint(max_prompt_tokens=100),
        fingerprint(prompt="{question}?"),
    ]
    assert len(set(same)) == 1
    assert len({same[0], *others}) == 8


@pytest.fixture
def uneven(tmp_path: Path) -> str:
    return _file(tmp_path / "uneven.jsonl", ["1234", "1" * 40, "12345678", "2" * 50, "é" * 3])


def test_an_overlong_prompt_is_an_error_that_names_row_length_limit_and_remedy(
    uneven: str, bytes_tokenizer: Any
) -> None:
    with pytest.raises(DataError) as raised:
        PromptSource(_data({"path": uneven}, max_prompt_tokens=10), bytes_tokenizer, seed=0)
    assert str(raised.value) == (
        f"{uneven}:2: the prompt has 40 tokens, data.max_prompt_tokens is 10; 2 of 5 rows are longer, the longest has "
        "50; raise data.max_prompt_tokens, or set data.overlong: skip"
    )


def test_overlong_prompts_are_skipped_and_counted_on_request(uneven: str, bytes_tokenizer: Any) -> None:
    data = _data({"path": uneven}, max_prompt_tokens=10, overlong="skip")
    source = PromptSource(data, bytes_tokenizer, seed=0)
    assert (source.skipped, len(source)) == (2, 3)
    assert {source.take().id for _ in range(6)} == {f"uneven:{row}:{epoch}" for row in (0, 2, 4) for epoch in (0, 1)}


@pytest.mark.parametrize(("limit", "skipped"), [(3, 4), (4, 3), (5, 3), (6, 2), (7, 2), (8, 1), (49, 0), (50, 0)])
def test_length_is_judged_in_tokens_exactly(limit: int, skipped: int, tmp_path: Path, bytes_tokenizer: Any) -> None:
    """Lengths 4, 3, 8, 49 and, in UTF-8, 6."""
    path = _file(tmp_path / "a.jsonl", ["1234", "123", "12345678", "2" * 49, "é" * 3])
    source = PromptSource(_data({"path": path}, max_prompt_tokens=limit, overlong="skip"), bytes_tokenizer, seed=0)
    assert source.skipped == skipped


def test_a_source_of_overlong_prompts_only_is_an_error_even_when_skipping(uneven: str, bytes_tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"all 5 prompts are longer than data\.max_prompt_tokens \(3\), the longest has 50"
    ):
        PromptSource(_data({"path": uneven}, max_prompt_tokens=3, overlong="skip"), bytes_tokenizer, seed=0)


def test_a_prompt_of_unknown_characters_only_is_an_error(tmp_path: Path, addition_tokenizer: Any) -> None:
    path = _file(tmp_path / "a.jsonl", ["é"])
    source = PromptSource(_data({"path": path}), addition_tokenizer, seed=0)
    with pytest.raises(DataError, match=re.escape(f"{path}:1: nothing of the prompt is in the model's vocabulary")):
        source.take()


def test_sources_of_one_name_are_refused(tmp_path: Path, addition_tokenizer: Any) -> None:
    path = _file(tmp_path / "sums.jsonl", ["1+1="])
    with pytest.raises(ConfigError, match=r"data\.train: sources .* are both named 'sums'"):
        PromptSource(_data({"path": path}, {"path": path}), addition_tokenizer, seed=0)


def test_evaluation_takes_the_first_rows_of_each_source_in_file_order(mixed: DataSpec, addition_tokenizer: Any) -> None:
    prompts = evaluation_prompts(mixed.train, mixed, addition_tokenizer, limit=2)
    assert [(p.id, p.index, p.source) for p in prompts] == [
        ("eval/few:0:0", 0, "few"),
        ("eval/few:1:0", 1, "few"),
        ("eval/many:0:0", 2, "many"),
        ("eval/many:1:0", 3, "many"),
    ]
    assert len(evaluation_prompts(mixed.train, mixed, addition_tokenizer)) == 27


def test_evaluation_on_the_held_out_sums(addition_tokenizer: Any) -> None:
    sources = [SourceSpec(path="builtin:addition", split="heldout")]
    prompts = evaluation_prompts(sources, _data({"path": "builtin:addition"}), addition_tokenizer, None)
    assert len(prompts) == 512
    assert (prompts[0].id, prompts[0].text, prompts[0].gold) == ("eval/addition-heldout:0:0", "22+13=", "35")
    assert addition_tokenizer.decode(prompts[0].token_ids) == "22+13="


def test_gsm8k_prompts_fit_the_bytes_model(shared: Path, bytes_tokenizer: Any) -> None:
    folder = shared / "data" / "gsm8k"
    settings = {"train": [{"path": str(folder)}], "max_prompt_tokens": 1536, "shuffle": False}
    source = PromptSource(DataSpec.model_validate(settings), bytes_tokenizer, seed=0)
    assert (len(source), source.skipped) == (7473, 0)
    first = source.take()
    assert first.id == "gsm8k:0:0"
    assert first.text.startswith("<|im_start|>user\nNatalia sold clips to 48 of her friends in April, and then ")
    assert first.gold == "72"
    assert bytes_tokenizer.decode(first.token_ids) == first.text
