"""Calibration data as a user gives it: a text, token ids, arrays, or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from hal.errors import InputError
from hal.ir import Graph
from hal.passes.quantize.calibration import Calibration, Sample
from hal.quantization.images import read_images
from hal.runtime.evaluation import read_numpy

_WINDOW = 512
_ROWS = 64
"""Windows that are taken of a text: 64 x 512 tokens are what the methods' authors use."""

_CALL_BYTES = 4 << 20
"""Inputs that are run together."""

_KINDS = "a text file, a .npy of token ids, an .npz of arrays by input name, or a folder of images"


def load_calibration(
    given: Any, graph: Graph, tokenizer: Path | None, folder: Path | None = None
) -> Calibration:
    """Samples for ``graph``.

    Args:
        given: a :class:`Calibration`; token ids ``[n]`` or ``[rows, length]``; arrays by input name
            with the examples along the first axis; a sequence of such dictionaries, one for each
            run; or the path of a text file, a ``.npy``, an ``.npz``, or a folder of images (see
            :mod:`hal.quantization.images`).
        graph: the neutral graph.
        tokenizer: the model's ``tokenizer.json``, which reads texts.
        folder: where finished layers are kept.

    Raises:
        InputError: there is no such file; it is empty, of another dtype or shape than the model
            takes, not finite, or a text for a model without a tokenizer.
    """
    if isinstance(given, Calibration):
        found = given
    else:
        if isinstance(given, str | Path):
            path = Path(given)
            given = read_images(path, graph) if path.is_dir() else _read(path, tokenizer)
        found = _calibration(given, graph, folder)
    found.check(graph)
    return found


def unvarying(calibration: Calibration, graph: Graph) -> str:
    """A sentence about data that is one number everywhere; nothing if it varies."""
    names = [spec.name for spec in graph.signature().inputs]
    arrays = [sample[name] for sample in calibration.samples for name in names]
    values = {float(end) for array in arrays for end in (array.min(), array.max())}
    if len(values) != 1:
        return ""
    return f"the calibration data is {values.pop():g} everywhere: what it measures means little"


def check_readable(path: Path) -> None:
    """Find what is wrong with a file of calibration data without its model, before long work.

    Raises:
        InputError: there is nothing, it is empty, or not what its name says.
    """
    if path.is_dir():
        return
    if path.suffix in (".npy", ".npz"):
        found = _arrays(path)
        for array in found.values() if isinstance(found, dict) else [found]:
            if not array.size:
                raise InputError(f"{path} is empty", f"give {_KINDS}")
    elif not _text(path).strip():
        raise InputError(f"{path} is empty", f"give {_KINDS}")


def _calibration(given: Any, graph: Graph, folder: Path | None) -> Calibration:
    if isinstance(given, Mapping):
        arrays = {name: np.asarray(value) for name, value in given.items()}
        return Calibration(_in_calls(graph, arrays), folder)
    if isinstance(given, list | tuple) and given and isinstance(given[0], Mapping):
        return Calibration([{n: np.asarray(v) for n, v in one.items()} for one in given], folder)
    array, inputs = np.asarray(given), graph.signature().inputs
    if array.dtype.kind == "f" and len(inputs) == 1 and not graph.state:
        return Calibration(_in_calls(graph, {inputs[0].name: array}), folder)
    return Calibration.from_tokens(graph, _in_windows(array, graph), folder=folder)


def _in_calls(graph: Graph, arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Arrays with examples along the first axis, cut into calls.

    A call has as many as the model insists on (what is left over is dropped), or, where it takes
    any number, as fit in a few megabytes. Arrays that do not go together are left as they are.
    """
    specs = graph.input_specs()
    if graph.state or set(specs) != set(arrays) or any(not spec.dims for spec in specs.values()):
        return [arrays]
    firsts = {spec.dims[0] for spec in specs.values() if spec.dims}
    counts = {len(array) for array in arrays.values() if array.ndim}
    if len(firsts) != 1 or len(counts) != 1 or any(not array.ndim for array in arrays.values()):
        return [arrays]
    (first,), (count,) = firsts, counts
    if isinstance(first, int):
        starts = range(0, count - first + 1, first) if 0 < first < count else range(1)
        return [{n: a[s : s + first] for n, a in arrays.items()} for s in starts]
    pieces = -(-sum(array.nbytes for array in arrays.values()) // _CALL_BYTES)
    cuts = np.array_split(np.arange(count), min(max(pieces, 1), max(count, 1)))
    return [
        {name: array[cut[0] : cut[-1] + 1] for name, array in arrays.items()}
        for cut in cuts
        if len(cut)
    ] or [arrays]


def _arrays(path: Path) -> Any:
    """An array, or arrays by name."""
    found = read_numpy(path, "a .npy or .npz file")
    if not isinstance(found, np.lib.npyio.NpzFile):
        return found
    with found:
        try:
            return {name: found[name] for name in found.files}
        except ValueError as error:  # Python objects
            raise InputError(
                f"{path} holds something that is no array of numbers",
                "save arrays by input name with numpy.savez",
            ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}", f"give {_KINDS}") from error


def _read(path: Path, tokenizer: Path | None) -> Any:
    if path.suffix in (".npy", ".npz"):
        return _arrays(path)
    text = _text(path)
    if tokenizer is None:
        raise InputError(
            "the model has no tokenizer, so a text cannot calibrate it",
            "give token ids (.npy) or arrays by input name (.npz)",
        )
    inner = tokenizers.Tokenizer.from_file(str(tokenizer))
    inner.no_truncation()
    inner.no_padding()
    ids = inner.encode(text, add_special_tokens=False).ids
    if len(ids) < 2:
        raise InputError(f"{path} has {len(ids)} token(s)", "give some thousand words")
    return np.asarray(ids, np.int64)


def _in_windows(tokens: np.ndarray, graph: Graph) -> np.ndarray:
    """A row of tokens cut into at most 64 windows of at most 512, spread over the text."""
    if tokens.ndim != 1 or not tokens.size:
        return tokens
    room = graph.metadata.get("max_positions") or _WINDOW
    length = min(_WINDOW, int(room), len(tokens))
    starts = np.arange(len(tokens) // length) * length
    if len(starts) > _ROWS:
        starts = starts[np.linspace(0, len(starts) - 1, _ROWS).astype(int)]
    return np.stack([tokens[start : start + length] for start in starts])


__all__ = ["Calibration", "Sample", "check_readable", "load_calibration"]
