"""A learner's checkpoint: what it holds beyond DeepSpeed's files, and what is refused before an engine is touched."""

from __future__ import annotations

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sapo_ray.config.spec import JobSpec
from sapo_ray.errors import CheckpointError
from sapo_ray.learner import checkpoint
from sapo_ray.learner.checkpoint import Progress
from sapo_ray.learner.engine import Place

SPEC = JobSpec.model_validate({"steps": 1, "model": {"path": "m"}, "data": {"train": [{"path": "d"}]}})
PLACE = Place(rank=0, ranks=1, gpu=False, transport="shared_memory")


class Files:
    def save(self, state_dict: Any, path: Path) -> None:
        torch.save(state_dict, path)


class Engine:
    """Stands for DeepSpeed's: writes `state` and reads it as DeepSpeed does, asking for the unrestricted loader."""

    def __init__(self, state: Any = None) -> None:
        self.state = state
        self.checkpoint_engine = Files()

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag).mkdir()
        self.checkpoint_engine.save(self.state, Path(folder) / tag / "state.pt")

    def _copy_recovery_script(self, path: str) -> None: ...

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        self.state = torch.load(Path(folder) / tag / "state.pt", weights_only=False)
        return folder, {}


class Malicious:
    """Unpickled without restraint, it makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (Path.touch, (self.proof,))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn(1)  # the second of the pair it drew is part of the state
    checkpoint.save(Engine({}), tmp_path, PLACE, SPEC, Progress(steps=7, nonfinite_in_row=2))
    expected = (random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist())
    assert checkpoint.load(Engine(), tmp_path, PLACE, SPEC) == Progress(steps=7, nonfinite_in_row=2)
    assert (random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()) == expected


@pytest.mark.parametrize("as_in_python", ["this", "3.11.2"])
def test_records_of_deepspeed_are_read_and_the_loader_is_restricted_for_the_load_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_in_python: str
) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    if as_in_python == "3.11.2":
        monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))

    state = {
        "loss_scaler": LossScaler(scale=1.0),
        "zero_stage": ZeroStageEnum.optimizer_states,
        "slices": fragment_address(numel=3, start=5),
        "lr": 1e-3,
        "tensor": torch.arange(3),
    }
    checkpoint.save(Engine(state), tmp_path, PLACE, SPEC, Progress())
    engine = Engine()
    checkpoint.load(engine, tmp_path, PLACE, SPEC)
    assert engine.state["loss_scaler"].cur_scale == 1.0
    assert engine.state["zero_stage"] is ZeroStageEnum.optimizer_states
    assert engine.state["slices"] == fragment_address(numel=3, start=5)
    assert engine.state["tensor"].tolist() == [0, 1, 2]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "deepspeed" / "state.pt", weights_only=True)


@pytest.mark.parametrize("file", ["deepspeed/state.pt", "random-0.pt"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, file: str) -> None:
    checkpoint.save(Engine({}), tmp_path, PLACE, SPEC, Progress())
    proof = tmp_path / "proof"
    torch.save({"x": Malicious(proof)}, tmp_path / file)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.load(Engine(), tmp_path, PLACE, SPEC)
    assert not proof.exists()
    torch.load(tmp_path / file, weights_only=False)
    assert proof.exists(), "it would have run"


@pytest.mark.parametrize(
    ("key", "then", "said"),
    [
        ("ranks", 2, r"learner.ranks is 1, but .* written with 2; set it to 2"),
        ("zero_stage", 1, r"learner.zero_stage is \d, but .* written with 1; set it to 1"),
        ("dtype", "float64", r"model.dtype is \w+, but .* written with float64"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused_before_anything_is_loaded(
    tmp_path: Path, key: str, then: object, said: str
) -> None:
    checkpoint.save(Engine({}), tmp_path, PLACE, SPEC, Progress())
    about = json.loads((tmp_path / "learner.json").read_text())
    (tmp_path / "learner.json").write_text(json.dumps(about | {key: then}))
    engine = Engine("untouched")
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(engine, tmp_path, PLACE, SPEC)
    assert engine.state == "untouched"


def test_a_damaged_file_of_random_states_is_refused(tmp_path: Path) -> None:
    checkpoint.save(Engine({}), tmp_path, PLACE, SPEC, Progress())
    (tmp_path / "random-0.pt").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="choose an earlier checkpoint"):
        checkpoint.load(Engine(), tmp_path, PLACE, SPEC)
