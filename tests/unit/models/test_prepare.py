"""From model.path to a folder, or to an error that says what to do."""

from __future__ import annotations

import multiprocessing
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sapo_ray.config.spec import ModelSpec
from sapo_ray.errors import ModelError
from sapo_ray.models import prepare
from sapo_ray.models.prepare import prepare_model
from sapo_ray.models.tokenizer import load_tokenizer


def _spec(path: Path | str, **settings: Any) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(path), **settings})


@pytest.mark.parametrize("path", ["builtin:addition", "builtin:bytes"])
def test_a_builtin_is_made_once(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    assert prepare_model(_spec(path), folder, seed=0) == folder
    written = (folder / "model.safetensors").stat()
    assert prepare_model(_spec(path), folder, seed=0) == folder
    assert (folder / "model.safetensors").stat() == written
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert load_tokenizer(folder).eos_token_id == 2


def test_a_folder_that_holds_another_model_is_not_overwritten(tmp_path: Path) -> None:
    folder = prepare_model(_spec("builtin:addition"), tmp_path / "model", seed=0)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"'seed': 1.*, but it holds .*'seed': 0.*; take another run_dir, or remove"):
        prepare_model(_spec("builtin:addition"), folder, seed=1)
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(ModelError, match="but it holds something else"):
        prepare_model(_spec("builtin:addition"), tmp_path / "mine", seed=0)


def test_a_preparation_that_dies_halfway_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(folder: Path, seed: int) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setitem(prepare.BUILTIN, "builtin:addition", die)
    with pytest.raises(KeyboardInterrupt):
        prepare_model(_spec("builtin:addition"), tmp_path / "model", seed=0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    prepare_model(_spec("builtin:addition"), tmp_path / "model", seed=0)


def _prepare(folder: Path, barrier: Any) -> None:
    barrier.wait(60)
    prepare_model(_spec("builtin:addition"), folder, seed=0)


def test_two_processes_may_prepare_the_same_model_at_once(tmp_path: Path) -> None:
    # Forked: torch is loaded here already, and to load it twice more would be nearly all that this test does.
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_prepare, args=(tmp_path / "model", barrier), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_unknown_builtin_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match="'builtin:sums' is not known; builtin models are builtin:addition, builtin:bytes"
    ):
        prepare_model(_spec("builtin:sums"), tmp_path, seed=0)


def test_a_missing_folder_says_what_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"no such folder \(looked in .*\); give an existing folder, a Hugging Face id"
    ):
        prepare_model(_spec(tmp_path / "missing"), tmp_path / "model", seed=0)


def test_a_hub_id_that_cannot_be_reached_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        prepare_model(_spec("nobody/no-such-model"), tmp_path / "model", seed=0)
    text = str(raised.value)
    assert text.startswith("model.path 'nobody/no-such-model': no such folder here, and the Hugging Face Hub did not")
    assert text.endswith("or download it where there is a network and give the folder")


def test_a_local_folder_is_checked_and_used_where_it_lies(tmp_path: Path) -> None:
    made = prepare_model(_spec("builtin:bytes"), tmp_path / "made", seed=0)
    assert prepare_model(_spec(made), tmp_path / "unused", seed=0) == made.resolve()
    assert not (tmp_path / "unused").exists()


def _without(folder: Path, name: str) -> Path:
    copy = folder.parent / f"without-{name}"
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    return copy


def test_a_folder_that_lacks_a_part_says_which(tmp_path: Path) -> None:
    made = prepare_model(_spec("builtin:bytes"), tmp_path / "made", seed=0)
    unused = tmp_path / "unused"
    with pytest.raises(ModelError, match=r"no config\.json there; give a folder saved by model\.save_pretrained"):
        prepare_model(_spec(_without(made, "config.json")), unused, seed=0)
    with pytest.raises(ModelError, match=r"no \*\.safetensors file there"):
        prepare_model(_spec(_without(made, "model.safetensors")), unused, seed=0)
    with pytest.raises(ModelError, match="is a file; give the folder that holds config"):
        prepare_model(_spec(made / "config.json"), unused, seed=0)
    (made / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged \(Expecting property name"):
        prepare_model(_spec(made), unused, seed=0)


def test_a_missing_or_damaged_tokenizer_is_named_with_the_files_it_needs(tmp_path: Path) -> None:
    made = prepare_model(_spec("builtin:bytes"), tmp_path / "made", seed=0)
    needs = (
        "; the folder needs tokenizer.json and tokenizer_config.json: save them there with tokenizer.save_pretrained"
    )
    (made / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"made': no tokenizer could be loaded \(.*\)" + re.escape(needs)):
        load_tokenizer(made)
    (made / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"loaded \(no tokenizer file is there\)" + re.escape(needs)):
        load_tokenizer(made)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    made = prepare_model(_spec("builtin:bytes"), tmp_path / "made", seed=0)
    config = made / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": null'))
    with pytest.raises(ModelError, match="the tokenizer has no end-of-sequence token, so completions could never end"):
        load_tokenizer(made)
