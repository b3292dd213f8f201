"""What a worker must hold before it is believed: the manifest, the bytes, the canary, and the gate in front of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from sapo_ray.errors import WeightsRefused
from sapo_ray.rollout.attestation import Gate, canary_differences, check_canary, check_manifest, check_received
from sapo_ray.types import Canary, PolicyVersion, Takeover, TensorMeta, WeightsManifest
from sapo_ray.weights.fingerprint import fingerprint

EXPECTED = {"a": (2, 3), "b": (4,)}
VERSION = PolicyVersion(1, 7)


def tensor(name: str, **changes: object) -> TensorMeta:
    meta = TensorMeta(
        name=name, dtype="float32", shape=EXPECTED.get(name, (1,)), bucket=0, offset=0, nbytes=24, checksum=11
    )
    return replace(meta, **changes)  # type: ignore[arg-type]


def manifest(*tensors: TensorMeta) -> WeightsManifest:
    return WeightsManifest(
        version=VERSION,
        fingerprint=fingerprint(VERSION, tensors),
        tensors=tensors,
        bucket_nbytes=(64,),
        canary=Canary(sequences=((1, 2, 3),), logprobs=((-1.0, -2.0),)),
        transport="shared_memory",
    )


def takeover(largest: float, mean: float) -> Takeover:
    return Takeover(worker="rollout-0", version=VERSION, seconds=0.1, canary_max=largest, canary_mean=mean)


def test_a_whole_manifest_is_accepted() -> None:
    check_manifest(manifest(tensor("a"), tensor("b")), EXPECTED, "float32")


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ((tensor("a"),), r"1 missing \(b\)"),
        ((tensor("a"), tensor("b"), tensor("c")), r"1 unknown \(c\)"),
        ((tensor("a"), tensor("b"), tensor("b")), "not those of the model"),
        ((tensor("a"), tensor("b", shape=(2, 2))), r"b of weights 1.7 is float32\[2, 2\], expected float32\[4\]"),
        ((tensor("a"), tensor("b", dtype="bfloat16")), "expected float32"),
    ],
)
def test_a_manifest_of_other_weights_is_refused(tensors: tuple[TensorMeta, ...], complaint: str) -> None:
    with pytest.raises(WeightsRefused, match=complaint):
        check_manifest(manifest(*tensors), EXPECTED, "float32")


def test_a_manifest_whose_version_was_exchanged_is_refused() -> None:
    forged = replace(manifest(tensor("a"), tensor("b")), version=PolicyVersion(1, 8))
    with pytest.raises(WeightsRefused, match="fingerprint"):
        check_manifest(forged, EXPECTED, "float32")


def test_what_arrived_must_be_all_of_the_manifest_and_nothing_else() -> None:
    sent = manifest(tensor("a"), tensor("b"))
    a, b = ("a", "float32", [2, 3], 11), ("b", "float32", [4], 11)
    check_received(sent, [a, b])
    with pytest.raises(WeightsRefused, match=r"1 tensors of weights .* did not arrive: .'b'"):
        check_received(sent, [a])
    with pytest.raises(WeightsRefused, match=r"arrived damaged: .'b'"):
        check_received(sent, [a, ("b", "float32", [4], 12)])
    with pytest.raises(WeightsRefused, match=r"arrived damaged: .'c'"):
        check_received(sent, [a, b, ("c", "float32", [4], 12)])


def test_canary_differences_are_over_all_tokens_of_all_sequences() -> None:
    canary = Canary(sequences=((1, 2, 3), (4, 5)), logprobs=((-1.0, -2.0), (-3.0,)))
    assert canary_differences(canary, [[-1.0, -2.3], [-2.7]]) == pytest.approx((0.3, 0.2))


def test_an_empty_canary_attests_nothing() -> None:
    with pytest.raises(WeightsRefused, match="no tokens"):
        canary_differences(Canary(sequences=(), logprobs=()), [])


@pytest.mark.parametrize(
    ("dtype", "largest", "mean", "passes"),
    [
        ("float32", 9e-5, 1e-5, True),
        ("float32", 2e-4, 1e-5, False),
        ("bfloat16", 0.29, 0.019, True),
        ("bfloat16", 0.31, 0.019, False),
        ("bfloat16", 0.29, 0.021, False),
        ("float32", float("nan"), float("nan"), False),
        ("bfloat16", 0.1, float("nan"), False),
    ],
)
def test_the_canary_allows_engine_noise_and_no_more(dtype: str, largest: float, mean: float, passes: bool) -> None:
    if passes:
        check_canary(takeover(largest, mean), dtype, None)
        return
    with pytest.raises(WeightsRefused, match="rollout-0 failed the canary"):
        check_canary(takeover(largest, mean), dtype, None)


def test_in_bfloat16_three_times_the_noise_of_the_first_takeover_is_noise_too() -> None:
    check_canary(takeover(0.59, 0.029), "bfloat16", takeover(0.2, 0.01))
    with pytest.raises(WeightsRefused):
        check_canary(takeover(0.61, 0.029), "bfloat16", takeover(0.2, 0.01))
    with pytest.raises(WeightsRefused):
        check_canary(takeover(2e-4, 1e-6), "float32", takeover(9e-5, 1e-6))


async def test_the_gate_opens_for_a_version_and_all_before_it() -> None:
    gate = Gate()
    waiting = asyncio.create_task(gate.passes(PolicyVersion(1, 2)))
    gate.attest(PolicyVersion(1, 1))
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.attest(PolicyVersion(2, 0))  # a later attempt
    await asyncio.wait_for(waiting, 1)
    await asyncio.wait_for(gate.passes(PolicyVersion(1, 1)), 1)


async def test_the_gate_is_shut_to_weights_that_were_restored_until_they_passed_though_later_numbers_had() -> None:
    gate = Gate()
    gate.attest(PolicyVersion(1, 9))
    restored = asyncio.create_task(gate.passes(PolicyVersion(1, 4, 1)))
    await asyncio.sleep(0)
    assert not restored.done()
    gate.attest(PolicyVersion(1, 4, 1))
    await asyncio.wait_for(restored, 1)
    await asyncio.wait_for(gate.passes(PolicyVersion(1, 9)), 1)


async def test_the_gate_never_opens_again_once_the_worker_was_refused() -> None:
    gate = Gate()
    gate.attest(PolicyVersion(1, 1))
    waiting = asyncio.create_task(gate.passes(PolicyVersion(1, 2)))
    await asyncio.sleep(0)
    gate.refuse(WeightsRefused("damaged"))
    gate.refuse(WeightsRefused("a later reason"))
    with pytest.raises(WeightsRefused, match="damaged"):
        await asyncio.wait_for(waiting, 1)
    with pytest.raises(WeightsRefused, match="damaged"):
        await asyncio.wait_for(gate.passes(PolicyVersion(1, 1)), 1)
