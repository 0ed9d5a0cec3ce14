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
from hal.runtime.evaluation import read_numpy

_WINDOW = 512
_ROWS = 64
"""Windows that are taken of a text: 64 x 512 tokens are what the methods' authors use."""

_KINDS = "a text file, a .npy of token ids, or an .npz of arrays by input name"


def load_calibration(
    given: Any, graph: Graph, tokenizer: Path | None, folder: Path | None = None
) -> Calibration:
    """Samples for ``graph``.

    Args:
        given: a :class:`Calibration`; token ids ``[n]`` or ``[rows, length]``; arrays by input name
            with the examples along the first axis; a sequence of such dictionaries, one for each
            run; or the path of a text file, a ``.npy`` or an ``.npz``.
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
            given = _read(Path(given), tokenizer)
        found = _calibration(given, graph, folder)
    found.check(graph)
    return found


def _calibration(given: Any, graph: Graph, folder: Path | None) -> Calibration:
    if isinstance(given, Mapping):
        return Calibration([{name: np.asarray(value) for name, value in given.items()}], folder)
    if isinstance(given, list | tuple) and given and isinstance(given[0], Mapping):
        return Calibration([{n: np.asarray(v) for n, v in one.items()} for one in given], folder)
    return Calibration.from_tokens(graph, _in_windows(np.asarray(given), graph), folder=folder)


def _read(path: Path, tokenizer: Path | None) -> Any:
    if path.is_dir():
        raise InputError(f"{path} is a folder", f"give {_KINDS}")
    if path.suffix in (".npy", ".npz"):
        found = read_numpy(path, "a .npy or .npz file")
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                return {name: found[name] for name in found.files}
        return found
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", "check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text: {error}", f"give {_KINDS}") from error
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


__all__ = ["Calibration", "Sample", "load_calibration"]
