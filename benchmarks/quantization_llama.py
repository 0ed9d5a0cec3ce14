"""llama.cpp's quantizers on matrices; runs by itself, where ``llama-cpp-python`` and ``gguf`` are.

::

    python quantization_llama.py FOLDER

FOLDER holds ``weights.npz`` (matrices float32 ``[out, in]`` by name) and ``squares.npz`` (the mean
square of each matrix's inputs, ``[in]``: what llama.cpp calls an importance matrix), and
``done.json`` what to leave out. Each matrix
goes through ``ggml_quantize_chunk``, which is what ``llama_model_quantize`` calls for each tensor,
and through gguf's ``dequantize``. For each type a line of JSON is printed, with the bits of these
matrices and those that fell back to another type as their rows are no whole number of blocks; the
results are in ``result.npz``. A line on standard input asks for the next.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

TYPES = (
    ("Q8_0", False),
    ("Q4_0", False),
    ("Q4_0", True),
    ("Q4_1", False),
    ("Q4_K", False),
    ("Q4_K", True),
    ("IQ4_NL", True),
    ("IQ4_XS", True),
    ("Q3_K", False),
    ("Q3_K", True),
    ("IQ3_S", True),
    ("Q2_K", False),
    ("Q2_K", True),
    ("IQ2_S", True),
    ("IQ2_XS", True),
    ("TQ2_0", False),
    ("MXFP4", False),
)
"""Types, and whether the data's importances are used."""

FALLBACK = "Q8_0"
"""For rows that are no whole number of a type's blocks; llama.cpp takes smaller ones."""

_FLOATS = ctypes.POINTER(ctypes.c_float)


def library() -> ctypes.CDLL:
    """The part of llama.cpp that has the quantizers."""
    found = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, _FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        _FLOATS,
    ]  # fmt: skip
    return found


def quantized(
    ggml: ctypes.CDLL, kind: GGMLQuantizationType, matrix: np.ndarray, squares: np.ndarray | None
) -> tuple[np.ndarray, int]:
    """The matrix after rounding, float32 ``[out, in]``, and its bytes."""
    rows, columns = matrix.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.zeros((rows, columns // block * size), np.uint8)
    source = np.ascontiguousarray(matrix, np.float32)
    weights = None
    if squares is not None:
        weights = np.ascontiguousarray(squares, np.float32).ctypes.data_as(_FLOATS)
    written = ggml.ggml_quantize_chunk(
        int(kind), source.ctypes.data_as(_FLOATS), packed.ctypes.data, 0, rows, columns, weights
    )
    assert written == packed.nbytes, (written, packed.nbytes)
    return dequantize(packed, kind).reshape(rows, columns), packed.nbytes


def answer(facts: dict[str, Any]) -> None:
    """Tell, and wait until it was read."""
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()


def main() -> None:
    """All types, one after the other."""
    folder = Path(sys.argv[1])
    weights = dict(np.load(folder / "weights.npz"))
    squares = dict(np.load(folder / "squares.npz"))
    ggml = library()

    names = ("llama-cpp-python", "gguf")
    answer({"versions": {name: importlib.metadata.version(name) for name in names}})
    done = [tuple(x) for x in json.loads((folder / "done.json").read_text())]
    for name, with_data in TYPES:
        method = "imatrix" if with_data else "rtn"
        if (name.lower(), method) in done:
            continue
        start = time.perf_counter()
        facts: dict[str, Any] = {"format": name.lower(), "method": method}
        try:
            made, used, fell_back = {}, 0, []
            for key, matrix in weights.items():
                kind = GGMLQuantizationType[name]
                if matrix.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
                    kind = GGMLQuantizationType[FALLBACK]
                    fell_back.append(key)
                importance = squares[key] if with_data else None
                made[key], size = quantized(ggml, kind, matrix, importance)
                used += size
            np.savez(folder / "result.npz", **made)
            count = sum(matrix.size for matrix in weights.values())
            facts |= {"bits": 8 * used / count, "weights": count, "fell_back": fell_back}
            facts["seconds"] = time.perf_counter() - start
        except Exception as error:  # noqa: BLE001 - what cannot be made is told
            facts["error"] = f"{type(error).__name__}: {error}"
        answer(facts)


if __name__ == "__main__":
    main()
