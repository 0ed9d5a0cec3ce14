"""Checkpoints of 16-bit floats as files of float32, which are mapped instead of held in memory."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_NARROW = frozenset({"BF16", "F16"})
_WEIGHTS = ".safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 1 << 28
"""A file's size, and the memory that writing it takes."""


@contextlib.contextmanager
def as_float32(path: Path) -> Iterator[Path]:
    """``path``, or a temporary copy of that model whose 16-bit weights are float32.

    transformers maps weights that have the wanted dtype already; those that it has to convert
    would lie in memory, four bytes each, for as long as the model lives. What was mapped stays
    valid when the copy is gone.

    Raises:
        Whatever safetensors raises for files that are damaged.
    """
    files = _weight_files(path)
    if not any(_dtypes(file) & _NARROW for file in files):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hal-weights-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for file in path.iterdir():
            if file.is_file() and not file.name.endswith((_WEIGHTS, _INDEX)):
                (folder / file.name).symlink_to(file.resolve())
        _write(files, folder)
        yield folder


def _weight_files(path: Path) -> list[Path]:
    """What transformers would read: the files of the index, where there is one."""
    index = path / _INDEX
    if (single := path / "model.safetensors").is_file() or not index.is_file():
        return [single] if single.is_file() else sorted(path.glob(f"*{_WEIGHTS}"))
    named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [path / name for name in sorted(named)]


def _dtypes(file: Path) -> set[str]:
    with safe_open(file, "pt") as tensors:
        return {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118


def _write(files: list[Path], folder: Path) -> None:
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(where.values())):05d}{_WEIGHTS}"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                narrow = tensor.dtype in (torch.bfloat16, torch.float16)
                shard[name] = tensor.float() if narrow else tensor
                if sum(t.nbytes for t in shard.values()) >= _SHARD_BYTES:
                    flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


__all__ = ["as_float32"]
