"""The driver's files of a checkpoint: every bit comes back, and no code comes with them."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakePayloads, FakePrompts, job

from sapo_ray.config.load import spec_hash
from sapo_ray.driver.collector import GradedCompletion, GradedGroup
from sapo_ray.driver.payloads import append_texts, load_payloads, save_payloads
from sapo_ray.driver.state import DriverState, restore_window, save_state
from sapo_ray.driver.window import Window
from sapo_ray.errors import CheckpointError
from sapo_ray.types import (
    CompletionMeta,
    CompletionPayload,
    DropReason,
    Grading,
    PolicyVersion,
    Prompt,
    Verdict,
    VersionSpan,
)


def payload(seed: int, tokens: int, text: str) -> CompletionPayload:
    """Log-probs of arbitrary bits: denormals, both infinities and NaNs with a message among them."""
    bits = np.random.default_rng(seed).integers(0, 2**32, tokens, np.uint32)
    return CompletionPayload(
        prompt_token_ids=np.array([seed, 151_643, 2**31 - 1], np.int32),
        token_ids=np.arange(tokens, dtype=np.int32) * 7,
        logprobs=bits.view(np.float32),
        text=text,
    )


PAYLOADS = [payload(0, 5, "17+25=42"), payload(1, 0, ""), payload(2, 4096, "été ∑ 漢字 \x00 \ud800")]


def same(one: CompletionPayload, other: CompletionPayload) -> bool:
    arrays = ("prompt_token_ids", "token_ids", "logprobs")
    pairs = [(getattr(one, name), getattr(other, name)) for name in arrays]
    return one.text == other.text and all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def test_payloads_come_back_bit_by_bit(tmp_path: Path) -> None:
    path = str(tmp_path / "payloads.npz")
    save_payloads(path, *PAYLOADS)
    loaded = load_payloads(path, 3)
    assert isinstance(loaded, list)
    assert [same(a, b) for a, b in zip(PAYLOADS, loaded, strict=True)] == [True, True, True]


def test_one_payload_comes_without_a_list_as_a_task_that_returns_one_object_must_give_it(tmp_path: Path) -> None:
    path = str(tmp_path / "payloads.npz")
    save_payloads(path, PAYLOADS[0])
    loaded = load_payloads(path, 1)
    assert isinstance(loaded, CompletionPayload)
    assert same(loaded, PAYLOADS[0])


def test_no_payloads_are_a_file_too(tmp_path: Path) -> None:
    save_payloads(str(tmp_path / "payloads.npz"))
    assert load_payloads(str(tmp_path / "payloads.npz"), 0) == []


def test_samples_are_utf8_whatever_a_completion_ends_with(tmp_path: Path) -> None:
    for _ in range(2):
        append_texts(str(tmp_path / "samples.jsonl"), [{"prompt": "\udc80?"}], PAYLOADS[2])
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": "\ufffd?", "completion": "été ∑ 漢字 \x00 \ufffd"}] * 2


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_a_payload_file_of_somebody_else_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Bomb()))
    bombs = {name: np.array([Bomb()], dtype=object) for name in ("token_ids", "token_ids_lengths")}
    np.savez(tmp_path / "objects.npz", **bombs)  # type: ignore[arg-type]
    for name in ("pickle.npz", "objects.npz"):
        with pytest.raises(CheckpointError, match="holds no payloads that can be read"):
            load_payloads(str(tmp_path / name), 1)
    assert not (tmp_path / "exploded").exists()


def test_a_file_with_other_payloads_than_the_checkpoint_names_is_refused(tmp_path: Path) -> None:
    save_payloads(str(tmp_path / "payloads.npz"), *PAYLOADS)
    with pytest.raises(CheckpointError, match=r"holds \[3\] payloads, the checkpoint names 2"):
        load_payloads(str(tmp_path / "payloads.npz"), 2)


def prompt(i: int) -> Prompt:
    return Prompt(id=f"t:{i}:0", index=i, source="t", text=f"{i}= «ü» \ud800", token_ids=(1, 2, i), gold=r"\frac{1}{3}")


def completion(i: int, sample: int, grading: Grading) -> GradedCompletion:
    spans = (
        VersionSpan(version=PolicyVersion(1, 3), start=0, end=2),
        VersionSpan(version=PolicyVersion(2, 4), start=2, end=5),
    )
    meta = CompletionMeta(
        group_id=f"t:{i}:0",
        sample_index=sample,
        prompt_tokens=3,
        tokens=5,
        finish_reason="length",
        spans=spans,
        worker="w0",
        seconds=0.1 + sample / 3,
    )
    return GradedCompletion(meta=meta, payload=payload(10 * i + sample, 5, f"{i}/{sample}"), grading=grading)


async def test_complete_groups_come_back_as_they_were_and_the_others_are_collected_again(tmp_path: Path) -> None:
    right = Grading(verdict=Verdict.CORRECT, reward=4 / 3, parts={"answer": 1.0, "form": 1 / 3}, seconds=0.1)
    error = Grading(verdict=Verdict.ERROR, reward=None, reason="crash", detail="ValueError: «no»")
    whole = GradedGroup(prompt=prompt(0), completions=(completion(0, 0, right), completion(0, 1, error)), reissues=1)
    given_up = GradedGroup(prompt=prompt(2), completions=(), reissues=2, failed=DropReason.QUARANTINED)
    never = asyncio.Event()

    async def collect(of: Prompt) -> GradedGroup:
        kept = {whole.prompt.id: whole, given_up.prompt.id: given_up}.get(of.id)
        if kept is None:
            await never.wait()
        assert kept is not None
        return kept

    window = Window(capacity=4)
    for i in range(3):
        window.issue(prompt(i), lambda i=i: asyncio.create_task(collect(prompt(i))))  # type: ignore[misc]
    await asyncio.sleep(0)
    spec, prompts = job(), FakePrompts()
    state = DriverState(
        step=7,
        prompts=prompts.state(),
        data_fingerprint=prompts.fingerprint,
        spec_hash=spec_hash(spec),
        before=None,
        updates=6,
        seconds={"training": 1.5},
    )
    await save_state(state, tmp_path, window, FakePayloads())
    await window.cancel()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["driver.json", "groups.json", "payloads.npz"]

    asked: list[str] = []

    async def again(of: Prompt) -> GradedGroup:
        asked.append(of.id)
        return given_up

    back = DriverState.read(tmp_path, prompts.fingerprint, spec_hash(spec))
    assert (back.step, back.updates, back.seconds, back.name) == (7, 6, {"training": 1.5}, tmp_path.name)
    restored = Window(capacity=4)
    await restore_window(back, tmp_path, restored, FakePayloads(), again)
    entries = list(restored.waiting())
    groups = [await entry.task for entry in entries]
    assert [entry.prompt for entry in entries] == [prompt(0), prompt(1), prompt(2)]
    assert asked == ["t:1:0"]
    assert groups[2] == given_up
    assert (groups[0].prompt, groups[0].reissues, groups[0].failed) == (whole.prompt, 1, None)
    for one, other in zip(groups[0].completions, whole.completions, strict=True):
        assert (one.meta, one.grading) == (other.meta, other.grading)
        assert isinstance(one.grading.verdict, Verdict)
        assert same(one.payload, other.payload)


def test_a_checkpoint_of_another_format_says_so(tmp_path: Path) -> None:
    from sapo_ray.driver.checkpoint import verify

    (tmp_path / "manifest.json").write_text('{"format": 1, "step": 3, "files": {}}')
    with pytest.raises(CheckpointError, match=r"is of format 1, this version of sapo-ray reads 2"):
        verify(tmp_path)
