"""Finished layers on disk, so that an interrupted run goes on where it stopped.

What a layer becomes depends on its weight, its setting, the samples and everything quantized before
it. The key of a layer is a digest of all that: a chain from the first layer on.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hal.passes.quantize.codes import Codes
from hal.passes.quantize.formats import Setting
from hal.passes.quantize.grid import code_dtype

_VERSION = "4"
"""Changes when a method does, so that nothing stale is taken up."""


class Finished:
    """Codes by key in ``folder``; without a folder nothing is kept or found."""

    def __init__(self, folder: Path | None, start: str) -> None:
        self._folder = folder
        self._chain = hashlib.sha256(f"{_VERSION} {start}".encode())
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def key(self, name: str, setting: Setting, weight: np.ndarray) -> str:
        """The key of the next layer. Layers are to be asked for in the order they are done."""
        if self._folder is None:
            return ""
        self._chain.update(f"{name} {setting} {weight.shape} {weight.dtype}".encode())
        self._chain.update(np.ascontiguousarray(weight).data)
        return self._chain.hexdigest()

    def load(self, key: str, setting: Setting) -> Codes | None:
        """The codes kept under ``key``; None if there are none, or a damaged file."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            arrays = load_file(path)
            form = setting.format
            codes = arrays["codes"].view(code_dtype(form))
            return Codes(form, codes, arrays["scale"], arrays.get("zero"))
        except (SafetensorError, KeyError, OSError):
            return None

    def save(self, key: str, codes: Codes) -> None:
        """Keep codes under ``key``. The file gets its name when it is whole."""
        path = self._path(key)
        if path is None:
            return
        arrays = {"codes": codes.codes.view(np.uint8), "scale": codes.scale}
        if codes.zero is not None:
            arrays["zero"] = codes.zero
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
        temporary.replace(path)

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{key}.safetensors"
