"""A published policy as a Hugging Face folder, written from its buckets: no learner takes part and none has to wait."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from sapo_ray.errors import ModelError, WeightsRefused
from sapo_ray.types import TensorMeta, WeightsManifest
from sapo_ray.weights.buckets import tensor_at
from sapo_ray.weights.fingerprint import checksum64

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json")
"""Files of the original folder that are not taken along."""


def export_hf(manifest: WeightsManifest, model_path: str, folder: str | Path, *buckets: np.ndarray) -> Path:
    """Write `folder` from published buckets: safetensors, configuration, tokenizer, generation configuration.

    buckets: uint8 [nbytes] each, in the manifest's order; one becomes one safetensors file. model_path: the folder
    (or Hub id, already downloaded) that the policy started from; everything in it but weights is taken along.
    Complete or absent: written beside, made durable, then renamed; an older export of that name is replaced.

    Raises
        WeightsRefused: a tensor's bytes are not those that were published
        ModelError: model_path is neither a folder nor in the local Hub cache
    """
    source, folder = _source(model_path), Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, bucket in enumerate(buckets):
        metas = [meta for meta in manifest.tensors if meta.bucket == number]
        name = "model.safetensors"
        if len(buckets) > 1:
            name = f"model-{number + 1:05d}-of-{len(buckets):05d}.safetensors"
        save_file({meta.name: _tensor(meta, bucket) for meta in metas}, partial / name, metadata={"format": "pt"})
        weight_map |= {meta.name: name for meta in metas}
    missing = {meta.name for meta in manifest.tensors} - set(weight_map)
    if missing:
        raise WeightsRefused(f"export of version {manifest.version}: no bytes for {sorted(missing)[:5]}")
    if len(buckets) > 1:
        total = sum(meta.nbytes for meta in manifest.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    _copy_the_rest(source, partial, manifest.tensors[0].dtype)
    _make_durable(partial)
    _swap(partial, folder)
    return folder


def _tensor(meta: TensorMeta, bucket: np.ndarray) -> torch.Tensor:
    raw = torch.from_numpy(bucket[meta.offset : meta.offset + meta.nbytes].copy())
    tensor = tensor_at(raw, 0, meta.nbytes, getattr(torch, meta.dtype), meta.shape)
    if checksum64(tensor) != meta.checksum:
        raise WeightsRefused(f"export: the bytes of {meta.name} are not those that were published")
    return tensor


def _source(model_path: str) -> Path:
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_path, local_files_only=True, ignore_patterns=list(WEIGHTS)))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise ModelError(f"model.path {model_path!r} is neither a folder nor in the local Hub cache") from error


def _copy_the_rest(source: Path, target: Path, dtype: str) -> None:
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHTS):
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))


def _make_durable(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
