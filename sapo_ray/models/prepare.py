"""From `model.path` to a folder that engines and learners can load."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download

from sapo_ray.config.spec import ModelSpec
from sapo_ray.errors import ModelError
from sapo_ray.models.builtin import make_addition_model, make_bytes_model
from sapo_ray.models.warm_start import Progress, warm_start

BUILTIN = {"builtin:addition": make_addition_model, "builtin:bytes": make_bytes_model}
MARKER = "builtin.json"
"""Says of a made folder what it holds; its presence means that the folder is complete."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


def prepare_model(spec: ModelSpec, folder: Path, seed: int, on_progress: Progress | None = None) -> Path:
    """A local folder with the model of `spec`.

    A builtin is made (and warm started, where the spec asks for it) in `folder`: all of it or nothing, and a second
    call finds it there. A local path is checked and returned; a Hub id is downloaded to the Hub's cache.

    Raises:
        ModelError: nothing usable is there; says what is missing and the way out.
    """
    if spec.path.startswith("builtin:"):
        return _prepare_builtin(spec, folder, seed, on_progress)
    local = Path(spec.path).expanduser()
    if local.exists():
        return _checked(local.resolve(), spec.path)
    if not _HUB_ID.fullmatch(spec.path):
        raise ModelError(
            f"model.path {spec.path!r}: no such folder (looked in {Path.cwd()}); give an existing folder, "
            f"a Hugging Face id such as Qwen/Qwen2.5-0.5B-Instruct, or one of {', '.join(BUILTIN)}"
        )
    return _checked(_download(spec), spec.path)


def _prepare_builtin(spec: ModelSpec, folder: Path, seed: int, on_progress: Progress | None) -> Path:
    make = BUILTIN.get(spec.path)
    if make is None:
        raise ModelError(f"model.path {spec.path!r} is not known; builtin models are {', '.join(BUILTIN)}")
    wanted = {"path": spec.path, "seed": seed, "warm_start_accuracy": spec.warm_start_accuracy}
    if _is_there(folder, wanted):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        make(made, seed)
        if spec.warm_start_accuracy is not None:
            warm_start(made, spec.warm_start_accuracy, seed, on_progress)
        (made / MARKER).write_text(json.dumps(wanted, indent=2) + "\n")
        try:
            os.rename(made, folder)
        except OSError:
            # Another process may have made the same model meanwhile; anything else in the way is an error.
            if not _is_there(folder, wanted):
                raise
    return folder


def _is_there(folder: Path, wanted: dict[str, object]) -> bool:
    """Whether `folder` holds the wanted model already; a folder that holds anything else is never overwritten."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    marker = folder / MARKER
    found = json.loads(marker.read_text()) if marker.exists() else None
    if found != wanted:
        raise ModelError(
            f"{folder} is to hold {wanted}, but it holds {found or 'something else'}; "
            "take another run_dir, or remove that folder"
        )
    return True


def _download(spec: ModelSpec) -> Path:
    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        # The Hub's client raises its own, its HTTP library's and the operating system's errors.
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"model.path {spec.path!r}: no such folder here, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}: {reason[0] if reason else 'no details'}); check the id and model.revision, "
            "or download it where there is a network and give the folder"
        ) from error


def _checked(folder: Path, path: str) -> Path:
    if not folder.is_dir():
        raise ModelError(f"model.path {path!r} is a file; give the folder that holds config.json and the weights")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"model.path {path!r}: no config.json there; give a folder saved by model.save_pretrained(folder)"
        ) from None
    except ValueError as error:
        raise ModelError(f"model.path {path!r}: config.json is damaged ({error}); save the model again") from error
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model.path {path!r}: no *.safetensors file there; save the model again with model.save_pretrained(folder)"
        )
    return folder
