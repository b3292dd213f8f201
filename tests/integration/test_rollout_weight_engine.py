"""vLLM's side of a weight update, in this process: registration, and what a native backend's wrapper sees."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sapo_ray.errors import WeightsRefused
from sapo_ray.weights.fingerprint import checksum64

pytestmark = [pytest.mark.integration]
engines = pytest.importorskip("sapo_ray.rollout.weight_engine", reason="needs vLLM", exc_type=ImportError)


class Model(torch.nn.Module):
    """Two parameters, loaded by name as vLLM's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(5))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            getattr(self, name).data.copy_(tensor)
            loaded.add(name)
        return loaded


class Native:
    """What vLLM's NCCL and IPC engines do with received tensors."""

    def start_weight_update(self) -> None: ...

    def receive_weights(self, update_info: dict[str, torch.Tensor]) -> None:
        self.model.load_weights(list(update_info.items()))  # type: ignore[attr-defined]

    def finish_weight_update(self) -> None: ...


@pytest.fixture
def engine() -> Any:
    class Wrapped(engines._NativeAttesting, Native):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.model, self.device = Model(), torch.device("cpu")
            self.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=False))

    return Wrapped()


WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.full((5,), -1.5)}


def test_vllm_finds_the_backends_by_itself() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    (plugin,) = entry_points(group=DEFAULT_PLUGINS_GROUP, name="sapo_ray")
    assert plugin.load() is engines.register
    engines.register()
    engines.register()
    assert {"sapo_shared_memory", "sapo_nccl", "sapo_ipc"} <= WeightTransferEngineFactory._registry.keys()


def test_the_checksum_of_every_pushed_tensor_is_noted_and_the_model_is_loaded(engine: Any) -> None:
    engine.start_weight_update()
    engine.receive_weights(WEIGHTS)
    engine.finish_weight_update()
    assert engine.received == {
        "a": ("float32", [2, 3], checksum64(WEIGHTS["a"])),
        "b": ("float32", [5], checksum64(WEIGHTS["b"])),
    }
    assert torch.equal(engine.model.b, WEIGHTS["b"])
    assert isinstance(engine.model, Model)


def test_a_push_that_leaves_a_parameter_out_is_refused(engine: Any) -> None:
    engine.start_weight_update()
    engine.receive_weights({"a": WEIGHTS["a"]})
    with pytest.raises(WeightsRefused, match="weights of 1 parameters did not arrive: b"):
        engine.finish_weight_update()


def test_a_tensor_that_arrives_twice_is_refused(engine: Any) -> None:
    engine.start_weight_update()
    engine.receive_weights(WEIGHTS)
    with pytest.raises(WeightsRefused, match="a arrived twice"):
        engine.receive_weights(WEIGHTS)


def test_nothing_is_kept_from_one_update_to_the_next(engine: Any) -> None:
    engine.start_weight_update()
    engine.receive_weights(WEIGHTS)
    engine.finish_weight_update()
    engine.start_weight_update()
    with pytest.raises(WeightsRefused, match="weights of 2 parameters did not arrive"):
        engine.finish_weight_update()
