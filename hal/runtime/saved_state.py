"""A running conversation as a file: the carried state in its neutral form.

What is stored does not depend on the build it came from: float32 tensors by row and state, without
pages, codes or padding. So a state exported on one route or layout goes on on any other. The file
is one safetensors file; its metadata names the model by digest, and a digest over everything shows
any change. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hal.bundle.files import checked_path
from hal.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

    from hal.ir import Graph
    from hal.runtime.session import Session

FORMAT = 1
"""Version of the file's metadata."""

_KEY = "hal.state"
_PART = 4 << 20


@dataclasses.dataclass(frozen=True)
class SavedState:
    """What a session carried.

    ``model`` is :func:`state_digest` of the model. ``tokens`` says how many tokens
    each row has seen, ``token_ids`` which ones, where that is known. ``arrays`` maps
    ``"<row>/<state>"`` to ``[heads, positions, channels]`` (or the state's own axes without the
    batch), and ``first`` to the position of its first entry: not 0 where a window has forgotten.
    """

    model: str
    tokens: tuple[int, ...]
    arrays: Mapping[str, np.ndarray]
    first: Mapping[str, int]
    token_ids: tuple[tuple[int, ...], ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    def digest(self) -> str:
        """SHA-256 over everything, as hexadecimal digits."""
        total = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            total.update(f"{name} {array.dtype} {array.shape}".encode())
            total.update(array.tobytes())
        return total.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the file, under a temporary name first.

        Raises:
            InputError: it cannot be written.
        """
        goal = checked_path(path, "state file")
        facts = {**self._facts(), "digest": self.digest()}
        data = save(
            {n: np.ascontiguousarray(a) for n, a in self.arrays.items()},
            metadata={_KEY: json.dumps(facts)},
        )
        scratch = goal.with_name(f".{goal.name}.tmp")
        try:
            scratch.write_bytes(data)
            scratch.replace(goal)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise InputError(
                f"the state cannot be written to {goal}: {error.strerror}", "choose another place"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> SavedState:
        """Read and check a file.

        Raises:
            InputError: no such file, no state, a newer format, or one that is cut off or changed.
        """
        name = checked_path(path, "state file")
        if name.is_dir():
            raise InputError(f"{name} is a folder, not a state file", "pass the file itself")
        if not name.is_file():
            raise InputError(f"there is no state file {name}", "check the path")
        try:
            with safe_open(name, "numpy") as file:
                facts = json.loads((file.metadata() or {})[_KEY])
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if facts["format"] > FORMAT:
                raise InputError(
                    f"{name} has state format {facts['format']}; this hal reads up to {FORMAT}",
                    "upgrade: pip install -U hal-compiler",
                )
            ids = facts["token_ids"]
            state = cls(
                facts["model"],
                tuple(facts["tokens"]),
                arrays,
                facts["first"],
                None if ids is None else tuple(tuple(row) for row in ids),
            )
            damaged = state.digest() != facts["digest"]
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(
                f"{name} is no state file, or it is damaged", "export the state again"
            ) from error
        if damaged:
            raise InputError(
                f"{name} does not match its digest: it was changed or cut off",
                "export the state again",
            )
        return state

    def _facts(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "tokens": list(self.tokens),
            "first": dict(self.first),
            "token_ids": None if self.token_ids is None else [list(row) for row in self.token_ids],
        }


def export_state(session: Session, token_ids: Sequence[Sequence[int]] | None = None) -> SavedState:
    """What ``session`` carries; see :meth:`hal.Session.export_state`."""
    carried, rows = session.state, session.rows
    if token_ids is not None and [len(ids) for ids in token_ids] != session.lengths:
        raise InputError(
            f"{[len(ids) for ids in token_ids]} token ids are given for rows that hold"
            f" {session.lengths}",
            "pass the ids that each row has seen",
        )
    arrays: dict[str, np.ndarray] = {}
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        for item in session.states:
            key = f"{index}/{item.name}"
            arrays[key], first[key] = carried.read(item, row)
    ids = None if token_ids is None else tuple(tuple(int(i) for i in row) for row in token_ids)
    return SavedState(session.model_digest, tuple(session.lengths), arrays, first, ids)


def import_state(session: Session, state: SavedState) -> None:
    """Go on from ``state``; see :meth:`hal.Session.import_state`."""
    if state.model != session.model_digest:
        raise InputError(
            f"the state belongs to another model ({state.model[:12]}…, this one is"
            f" {session.model_digest[:12]}…)",
            "load it into a bundle with the same weights that carries the same state",
        )
    names = [item.name for item in session.states]
    for index, tokens in enumerate(state.tokens):
        _check_row(session, state, index, tokens)
    session.reset()
    for index, tokens in enumerate(state.tokens):
        own = {
            name: (state.arrays[f"{index}/{name}"], state.first[f"{index}/{name}"])
            for name in names
        }
        session.add_row(tokens, own)


def _check_row(session: Session, state: SavedState, index: int, tokens: int) -> None:
    """Refuse a row whose arrays do not have the shapes that the model carries."""
    limit = session.bundle.manifest.metadata.get("max_positions")
    if tokens < 0 or (limit is not None and tokens > limit):
        raise InputError(
            f"the state has {tokens} tokens in row {index}, the model has {limit} positions",
            "export it again",
        )
    records = {record["name"]: record for record in session.bundle.manifest.state}
    for item in session.states:
        key, dims = f"{index}/{item.name}", records[item.name]["dims"]
        array, first = state.arrays.get(key), state.first.get(key)
        if array is None or first is None:
            raise InputError(
                f"the state has nothing for {item.name!r} of row {index}", "export it again"
            )
        wanted = [
            tokens - first if axis == item.growth_axis else dim
            for axis, dim in enumerate(dims)
            if item.axes[axis] != "batch"
        ]
        if not 0 <= first <= tokens or list(array.shape) != wanted:
            raise InputError(
                f"the state has {list(array.shape)} for {item.name!r} of row {index}, expected"
                f" {wanted}",
                "export it again",
            )


def state_digest(graph: Graph) -> str:
    """Names a model by its weights and by what it carries, SHA-256 as hexadecimal digits.

    Neither the order of nodes nor names that a compilation makes up have a part in it, so that
    compiling the same model again, for other targets or layouts, gives the same.
    """

    def of(tensor: ir.TensorProtocol) -> str:
        from onnx_ir import ExternalTensor  # states are saved and restored without a graph

        digest = hashlib.sha256(f"{tensor.dtype.name} {tensor.shape.numpy()}".encode())
        if not isinstance(tensor, ExternalTensor):
            digest.update(tensor.tobytes())
            return digest.hexdigest()
        # Read, not mapped: pages of a mapping would count as this process's memory.
        left = tensor.nbytes
        with Path(tensor.path).open("rb") as file:
            file.seek(tensor.offset or 0)
            while left and (part := file.read(min(left, _PART))):
                digest.update(part)
                left -= len(part)
        return digest.hexdigest()

    tensors = [v.const_value for v in graph.graph.initializers.values()]
    weights = [t for t in tensors if t is not None and t.dtype.is_floating_point() and t.size]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        digests = sorted(set(pool.map(of, weights)))
    specs = graph.input_specs()
    carried = [[*dataclasses.astuple(s), str(specs[s.input])] for s in graph.state]
    facts = json.dumps([digests, sorted(carried, key=str)], default=list)
    return hashlib.sha256(facts.encode()).hexdigest()
