"""A session: one loaded build of a bundle, with the state that it carries from call to call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hal.descriptor import parse
from hal.errors import BundleError, InputError, TargetError
from hal.ir import Dim, State, TensorSpec
from hal.runtime.arrays import check_inputs
from hal.runtime.executable import SegmentedExecutable
from hal.targets import load_backend
from hal.targets.backend import LoadContext

if TYPE_CHECKING:
    from hal.bundle.bundle import Bundle
    from hal.runtime.generate import Generated


class Session:
    """Runs one build. Not thread-safe: open one session for each thread.

    ::

        session = bundle.session("host:onnxruntime")
        logits = session(np.array([[1, 2, 3]]))          # carries the state on
        session.reset()
    """

    def __init__(self, bundle: Bundle, target: str, *, threads: int | None = None) -> None:
        self.bundle = bundle
        self.target = target
        manifest = bundle.manifest
        record = manifest.builds[target]
        self.inputs = tuple(spec_from_record(r.model_dump()) for r in manifest.inputs)
        self.outputs = tuple(spec_from_record(r.model_dump()) for r in manifest.outputs)
        self.states = tuple(State.from_json(_state_fields(s)) for s in manifest.state)
        self._state_specs = {
            s["input"]: TensorSpec(s["input"], s["dtype"], tuple(s["dims"])) for s in manifest.state
        }
        descriptor = parse(record.descriptor, f"{bundle.path} ({target})")
        count = threads or len(os.sched_getaffinity(0))
        parts = []
        for segment in record.segments:
            backend = load_backend(segment["backend"])
            context = LoadContext(descriptor, segment["folder"], bundle.files, count)
            executable = backend.load(segment["record"], context)
            parts.append((executable, segment["inputs"], segment["outputs"]))
        names = [s.name for s in self.outputs] + [s.output for s in self.states]
        self.executable = SegmentedExecutable(parts, names)
        self._store = self.executable.create_state(self.states) if self.states else None
        self._arrays: dict[str, Any] = {}
        self._batch: int | None = None
        self.position = 0
        """Tokens that the carried state holds (0 for models without state)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on positional or named inputs; returns one array, or a tuple in signature order.

        Raises:
            InputError: see :meth:`run`.
        """
        if len(args) > len(self.inputs):
            raise InputError(
                f"{len(args)} inputs given, the model takes {len(self.inputs)}",
                "expected " + ", ".join(str(s) for s in self.inputs),
            )
        named = {spec.name: value for spec, value in zip(self.inputs, args, strict=False)}
        twice = named.keys() & kwargs.keys()
        if twice:
            raise InputError(f"input {min(twice)!r} is given twice", "pass it once")
        results = self.run({**named, **kwargs})
        values = tuple(results[s.name] for s in self.outputs)
        return values[0] if len(values) == 1 else values

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run once and carry the state on.

        Args:
            inputs: arrays by input name: numpy, or anything that speaks DLPack.

        Returns:
            numpy arrays by output name, without the state.

        Raises:
            InputError: an input is unknown, missing, or has a wrong dtype, rank or extent.
        """
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"run() takes a dictionary of arrays by name, not a {type(inputs).__name__}",
                "expected " + ", ".join(str(s) for s in self.inputs),
            )
        arrays = check_inputs(inputs, self.inputs)
        self._check_ids(arrays)
        if not self.states:
            return self.executable.run(arrays)
        batch, length = self._batch_and_length(arrays)
        if self._batch not in (None, batch):
            raise InputError(
                f"the batch is {batch}, the carried state has {self._batch}",
                "call session.reset() before another batch size",
            )
        if self._store is not None:
            outputs = self.executable.step(arrays, self._store)
        else:
            outputs = self._step_arrays(arrays, batch)
        self._batch = batch
        self.position += length
        return {s.name: outputs[s.name] for s in self.outputs}

    def _check_ids(self, arrays: Mapping[str, Any]) -> None:
        """Refuse ids that the embedding has no row for; runtimes may read past the table."""
        size = self.bundle.manifest.metadata.get("vocab_size")
        ids = arrays.get("input_ids")
        if size and isinstance(ids, np.ndarray) and ids.size:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= size:
                wrong = low if low < 0 else high
                raise InputError(
                    f"input 'input_ids' has id {wrong}, the vocabulary is 0..{size - 1}",
                    "use the model's own tokenizer",
                )

    def _step_arrays(self, arrays: dict[str, Any], batch: int) -> dict[str, Any]:
        if not self._arrays:
            self._arrays = {s.name: self._empty(s, batch) for s in self.states}
        carried = {s.input: self._arrays[s.name] for s in self.states}
        outputs = self.executable.run({**arrays, **carried})
        for item in self.states:
            self._arrays[item.name] = outputs.pop(item.output)
        return outputs

    def _empty(self, state: State, batch: int) -> np.ndarray:
        return empty_state(state, self._state_specs[state.input], batch)

    def _batch_and_length(self, arrays: Mapping[str, Any]) -> tuple[int, int]:
        first = self.inputs[0]
        array = arrays[first.name]
        return int(array.shape[0]), int(array.shape[1]) if array.ndim > 1 else 1

    def reset(self) -> None:
        """Forget the carried state; the next call starts at position 0."""
        if self._store is not None:
            self._store.reset()
        self._arrays = {}
        self._batch = None
        self.position = 0

    def export_arrays(self) -> dict[str, np.ndarray]:
        """The carried state in neutral layout, by state name; empty before the first call."""
        if self._batch is None:
            return {}
        if self._store is not None:
            return {s.name: self._store.export_array(s.name) for s in self.states}
        return {name: np.asarray(value) for name, value in self._arrays.items()}

    def generate(self, prompt: str | list[int] | np.ndarray, **options: Any) -> Generated:
        """Continue a prompt; see :func:`hal.runtime.generate.generate` for the options.

        Returns:
            An iterator of text pieces for a text prompt, of token ids for ids.

        Raises:
            InputError: the model is no language model, or has no tokenizer for a text prompt.
        """
        from hal.runtime.generate import generate

        return generate(self, prompt, **options)

    def close(self) -> None:
        """Release the executable."""
        self.executable.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a Session is not iterable; call it, or use session.generate(...)")


def empty_state(state: State, spec: TensorSpec, batch: int) -> np.ndarray:
    """What a state holds before the first call: nothing along the growth axis, zeros otherwise.

    Raises:
        BundleError: an axis other than batch and growth is dynamic.
    """
    dims: list[int] = []
    for axis, dim in enumerate(spec.dims or ()):
        if axis == state.growth_axis:
            dims.append(0)
        elif isinstance(dim, int):
            dims.append(dim)
        elif state.axes[axis] == "batch":
            dims.append(batch)
        else:
            raise BundleError(
                f"state {state.name!r} has a dynamic axis {axis} ({dim})",
                "only batch and growth may be",
            )
    return np.zeros(dims, np.dtype(spec.dtype))


def open_session(
    bundle: Bundle, target: str | None = None, *, threads: int | None = None
) -> Session:
    """Load a build; without ``target``, the best one in the bundle that can run here.

    Raises:
        TargetError: no such build, or none that can run on this machine.
    """
    builds = bundle.manifest.builds
    if target is not None:
        name = find_build(target, builds)
        if name is None:
            raise TargetError(
                f"the bundle has no build for {target!r} (it has {', '.join(builds) or 'none'})",
                f"add one: hal retarget {bundle.path} --target {target} -o OUT.hal",
            )
        return Session(bundle, name, threads=threads)
    reasons = []
    for name, record in builds.items():
        probe = load_backend(record.backend).probe()
        if probe.status == "absent":
            reasons.append(f"{name}: {probe.reason}")
            continue
        return Session(bundle, name, threads=threads)
    raise TargetError(
        "no build in the bundle can run here" + (f" ({'; '.join(reasons)})" if reasons else ""),
        f"add one for this machine: hal retarget {bundle.path} --target host -o OUT.hal",
    )


def find_build(target: str, builds: Iterable[str]) -> str | None:
    """The build that ``target`` means: its full name, or the target's first route."""
    names = list(builds)
    if target in names:
        return target
    return next((n for n in names if n.split(":")[0] == target), None)


def spec_from_record(record: Mapping[str, Any]) -> TensorSpec:
    """A :class:`hal.ir.TensorSpec` from its record in the manifest."""
    dims: tuple[Dim, ...] | None = None if record["dims"] is None else tuple(record["dims"])
    return TensorSpec(record["name"], record["dtype"], dims, record["container"])


def _state_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: record[k] for k in ("name", "input", "output", "kind", "axes", "growth_axis")}
