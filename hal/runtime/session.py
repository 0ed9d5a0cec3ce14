"""A session: one loaded build of a bundle, with the state that it carries from call to call."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hal.descriptor import parse
from hal.errors import InputError, did_you_mean
from hal.ir import Dim, State, TensorSpec
from hal.ir.cache_plan import LAYOUTS, CachePlan
from hal.ir.picks import LOGITS, PICK
from hal.ir.step import Step
from hal.runtime import saved_state
from hal.runtime.arrays import check_inputs
from hal.runtime.executable import SegmentedExecutable
from hal.runtime.picks import Logits, check_logits, last_of, picked
from hal.runtime.saved_state import SavedState
from hal.runtime.state import CarriedState
from hal.runtime.stepping import in_steps
from hal.targets import load_backend
from hal.targets.backend import LoadContext

if TYPE_CHECKING:
    from hal.bundle.bundle import Bundle
    from hal.runtime.generate import Completion, Generated, Prompt


class Session:
    """Runs one build. Not thread-safe: open one session for each thread.

    ::

        session = bundle.session("host:onnxruntime")
        logits = session(np.array([[1, 2, 3]]))          # carries the state on
        session.reset()
    """

    def __init__(
        self,
        bundle: Bundle,
        target: str,
        *,
        threads: int | None = None,
        kv_layout: str | None = None,
    ) -> None:
        self.bundle = bundle
        self.target = target
        manifest = bundle.manifest
        record = manifest.builds[target]
        self.inputs = tuple(spec_from_record(r.model_dump()) for r in manifest.inputs)
        self.outputs = tuple(spec_from_record(r.model_dump()) for r in manifest.outputs)
        self.states = tuple(State.from_json(_state_fields(s)) for s in manifest.state)
        plan = CachePlan.from_json(record.cache) if record.cache else None
        if kv_layout is not None:
            plan = _in_layout(plan, kv_layout, target)
        specs = {
            s["input"]: TensorSpec(s["input"], s["dtype"], tuple(s["dims"])) for s in manifest.state
        }
        self.step_extents = Step(**record.step) if record.step else None
        limit = manifest.metadata.get("max_positions")
        self._state = CarriedState(self.states, specs, plan, limit, self.step_extents)
        self._rows: list[int] = []
        self._picks = record.picks
        descriptor = parse(record.descriptor, f"{bundle.path} ({target})")
        count = threads or len(os.sched_getaffinity(0))
        parts = []
        for segment in record.segments:
            backend = load_backend(segment["backend"])
            own = segment.get("descriptor")
            chip = descriptor if own is None else parse(own, f"{bundle.path} ({target})")
            context = LoadContext(chip, segment["folder"], bundle.files, count)
            executable = backend.load(segment["record"], context)
            parts.append((executable, segment["inputs"], segment["outputs"]))
        names = [s.name for s in self.outputs] + [s.output for s in self._state.by_value]
        self.executable = SegmentedExecutable(parts, names, plan.in_place() if plan else None)

    @property
    def plan(self) -> CachePlan | None:
        """How growing state is carried in pools; None if the build carries it by value."""
        return self._state.store.plan if self._state.store else None

    @property
    def capacity(self) -> int:
        """Positions that a row has room for in a build of static shapes; 0: no such limit."""
        return self.step_extents.capacity if self.step_extents else 0

    @property
    def position(self) -> int:
        """Tokens that the carried state holds (the longest row's; 0 for models without state)."""
        return max(self.lengths, default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row of the batch holds; empty before the first call."""
        return [self._state.tokens(row) for row in self._rows]

    @property
    def state_bytes(self) -> int:
        """Bytes of carried state that hold something now."""
        return self._state.bytes

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

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        lengths: Sequence[int] | None = None,
        logits: Logits = "all",
    ) -> dict[str, Any]:
        """Run once and carry the state on.

        Args:
            inputs: arrays by input name: numpy, or anything that speaks DLPack.
            lengths: tokens of each row that count, the rest of a row being padding on the right;
                None: all of them. Only with carried state, and only where rows may differ.
            logits: of a language model: ``"last"`` gives those of each row's last token that
                counts, ``[batch, 1, vocab]``, and computes no others where the build can.

        Returns:
            numpy arrays by output name, without the state. Outputs at padding mean nothing.

        Raises:
            InputError: an input is unknown, missing, or has a wrong dtype, rank or extent; the
                state has another batch size, or no room; ``lengths`` do not fit; ``"last"`` of a
                model that carries no state, or has no logits.
        """
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"run() takes a dictionary of arrays by name, not a {type(inputs).__name__}",
                "expected " + ", ".join(str(s) for s in self.inputs),
            )
        arrays = check_inputs(inputs, self.inputs)
        self._check_ids(arrays)
        self._check_logits(logits)
        if not self.states:
            return self.executable.run(arrays)
        batch, length = self._batch_and_length(arrays)
        if not self._rows:
            self._rows = [self._state.add() for _ in range(batch)]
        if len(self._rows) != batch:
            raise InputError(
                f"the batch is {batch}, the carried state has {len(self._rows)}",
                "call session.reset() before another batch size",
            )
        return self._advance(self._rows, arrays, length, lengths, logits)

    def step(
        self,
        rows: Sequence[int],
        input_ids: np.ndarray,
        lengths: Sequence[int] | None = None,
        logits: Logits = "all",
    ) -> np.ndarray:
        """Run new tokens of some rows of :attr:`state`, as a scheduler of many sequences does.

        Args:
            rows: numbers that ``session.state.add()`` gave.
            input_ids: int64 ``[len(rows), tokens]``, padded on the right.
            lengths: tokens of each row that count; None: all.
            logits: see :meth:`run`.

        Returns:
            Logits, float32 ``[len(rows), tokens, vocab]``, or ``[len(rows), 1, vocab]``.

        Raises:
            InputError: see :meth:`run`; the model takes more than ``input_ids``.
        """
        arrays = check_inputs({"input_ids": input_ids}, self.inputs)
        self._check_ids(arrays)
        self._check_logits(logits)
        outputs = self._advance(rows, arrays, input_ids.shape[1], lengths, logits)
        result: np.ndarray = outputs[LOGITS]
        return result

    @property
    def state(self) -> CarriedState:
        """The carried state by rows; see :meth:`step`."""
        return self._state

    def _advance(
        self,
        rows: Sequence[int],
        arrays: dict[str, Any],
        length: int,
        lengths: Sequence[int] | None,
        logits: Logits,
    ) -> dict[str, Any]:
        counts = [length] * len(rows) if lengths is None else _whole_numbers(lengths)
        if len(counts) != len(rows) or not all(0 <= n <= length for n in counts):
            raise InputError(
                f"lengths {counts} do not fit a batch of {len(rows)} rows of {length} tokens",
                "give one length from 0 to the padded length for each row",
            )
        self._state.check_counts(rows, counts, length)
        if self.step_extents is not None:
            return in_steps(self, rows, arrays, counts, logits)
        return self.run_once(rows, arrays, length, counts, logits)

    def run_once(
        self,
        rows: Sequence[int],
        arrays: Mapping[str, Any],
        length: int,
        counts: Sequence[int],
        logits: Logits,
    ) -> dict[str, Any]:
        """One call of the build, of arguments that were checked; see :meth:`step`."""
        feeds = {**arrays, **self._state.feeds(rows, length)}
        if self._picks:
            feeds[PICK] = picked(counts, length, logits)
        if self._state.take_changed():
            self.executable.forget_state()
        outputs = self.executable.run(feeds)
        self._state.advance(rows, counts, outputs)
        results = {s.name: outputs[s.name] for s in self.outputs}
        if logits == "last" and not self._picks:
            results[LOGITS] = last_of(results[LOGITS], counts)
        return results

    def _check_logits(self, logits: str) -> None:
        check_logits(logits)
        has = self.states and any(s.name == LOGITS for s in self.outputs)
        if logits == "last" and not has:
            raise InputError(
                "logits='last' is asked of a model that is no language model with carried state",
                "leave it out",
            )

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

    def _batch_and_length(self, arrays: Mapping[str, Any]) -> tuple[int, int]:
        first = self.inputs[0]
        array = arrays[first.name]
        batch, length = int(array.shape[0]), int(array.shape[1]) if array.ndim > 1 else 1
        if not batch or not length:
            raise InputError(
                f"input {first.name!r} is empty: {list(array.shape)}", "pass at least one token"
            )
        return batch, length

    def reset(self) -> None:
        """Forget the carried state; the next call starts at position 0."""
        self.executable.require_open()
        for row in reversed(self._rows):
            self._state.remove(row)
        self._rows = []

    def trim(self, length: int) -> None:
        """Forget all but the first ``length`` tokens of every row.

        Raises:
            InputError: a row holds fewer; some state is of fixed size, which cannot be taken back;
                or a sliding window has forgotten what that needs.
        """
        self.executable.require_open()
        if not is_whole(length):
            raise InputError(f"trim({length!r}) is no length", "pass a whole number of tokens")
        if not self._rows and length:
            raise InputError(
                f"the state holds 0 tokens, it cannot be trimmed to {length}",
                "run the session first",
            )
        for row in self._rows:
            self._state.trim(row, length)

    def fork(self) -> Session:
        """A session that goes on from here by itself; what it has seen is shared where pages are.

        Both use the same loaded build: call one at a time.
        """
        self.executable.require_open()
        forked = copy.copy(self)
        if self._state.store is not None and self._state.store.paged:
            forked._rows = [self._state.fork(row) for row in self._rows]
        else:
            forked._state, forked._rows = self._state.duplicate(), list(self._rows)
        return forked

    def export_arrays(self) -> dict[str, np.ndarray]:
        """The carried state in neutral layout, by state name; empty before the first call.

        Raises:
            InputError: rows differ in length.
        """
        self.executable.require_open()
        if not self._rows:
            return {}
        if len(set(self.lengths)) > 1:
            raise InputError(
                f"rows hold {self.lengths} tokens and do not make one array",
                "export the state: session.export_state()",
            )
        return {
            s.name: np.stack(
                [self._state.read(s, row)[0] for row in self._rows],
                axis=s.axes.index("batch") if "batch" in s.axes else 0,
            )
            for s in self.states
        }

    @property
    def rows(self) -> list[int]:
        """Rows of the batch that :meth:`run` goes on with."""
        return list(self._rows)

    def add_row(self, tokens: int, states: Mapping[str, tuple[np.ndarray, int]]) -> None:
        """Give the batch one more row, filled with states in neutral form."""
        self.executable.require_open()
        row = self._state.add()
        self._state.load(row, tokens, states)
        self._rows.append(row)

    @property
    def model_digest(self) -> str:
        """Names the weights and what is carried: bundles that can exchange states share it."""
        return self.bundle.manifest.state_digest or ""

    def export_state(self, token_ids: Sequence[Sequence[int]] | None = None) -> SavedState:
        """The carried state in a form that no build or layout shows in.

        Args:
            token_ids: for each row the tokens that it has seen, kept with the state.

        Raises:
            InputError: the number of ids is not that of the tokens seen.
        """
        self.executable.require_open()
        return saved_state.export_state(self, token_ids)

    def import_state(self, state: SavedState | str | Path) -> SavedState:
        """Go on from a state of the same model, whatever build or layout it came from.

        Returns:
            The state.

        Raises:
            InputError: the state is of another model, or its file is damaged or missing.
        """
        self.executable.require_open()
        if not isinstance(state, SavedState):
            state = SavedState.load(state)
        saved_state.import_state(self, state)
        return state

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """What the model predicts after each token of ``ids``, teacher-forced from position 0.

        Args:
            ids: token ids, one sequence.

        Returns:
            float32 ``[len(ids), vocab]``; row ``i`` is the distribution of token ``i + 1``.

        Raises:
            InputError: no language model, no ids, or ids outside the vocabulary.
        """
        from hal.runtime.generate import teacher_forced_logits

        return teacher_forced_logits(self, ids)

    def generate(self, prompt: Prompt, **options: Any) -> Generated:
        """Continue a prompt.

        Args:
            prompt: text, messages of a chat, or token ids.
            options: see :func:`hal.runtime.generate.generate`.

        Args:
            prompt: text, the messages of a chat, or token ids.

        Returns:
            An iterator of token ids for a prompt of ids, of text pieces otherwise.

        Raises:
            InputError: the model is no language model, has no tokenizer for text or no template
                for a chat, or an option is wrong.
        """
        from hal.runtime.generate import generate

        return generate(self, prompt, **options)

    def generate_batch(self, prompts: Iterable[Prompt], **options: Any) -> list[Completion]:
        """Continue several prompts together; see :func:`hal.runtime.generate.generate_batch`.

        Returns:
            One completion for each prompt, in order.

        Raises:
            InputError: as :meth:`generate`, naming the prompt; or there are no prompts.
        """
        from hal.runtime.generate import generate_batch

        return generate_batch(self, prompts, **options)

    def close(self) -> None:
        """Release the executable; every later call is a TargetError that says so."""
        self.executable.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a Session is not iterable; call it, or use session.generate(...)")


def is_whole(number: object) -> bool:
    """True for integers, NumPy's included, and not for booleans."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def _whole_numbers(lengths: object) -> list[int]:
    listed = isinstance(lengths, (list, tuple, np.ndarray)) and np.ndim(lengths) == 1
    if not listed or not all(is_whole(n) for n in lengths):  # type: ignore[attr-defined]
        raise InputError(
            f"lengths={lengths!r} is no list of whole numbers", "give one length for each row"
        )
    return [int(n) for n in lengths]  # type: ignore[attr-defined]


def _in_layout(plan: CachePlan | None, layout: str, target: str) -> CachePlan:
    if layout not in LAYOUTS:
        raise InputError(f"kv_layout={layout!r} is unknown", did_you_mean(layout, LAYOUTS))
    if plan is None or (plan.fixed and plan.layout != layout):
        has = "carries no cache in pools" if plan is None else f"has a {plan.layout} cache"
        raise InputError(
            f"the build for {target!r} {has}, it cannot use a {layout} one",
            f"build it so: hal retarget BUNDLE --target {target} --kv-cache {layout} -o OUT",
        )
    return dataclasses.replace(plan, layout=layout)


def spec_from_record(record: Mapping[str, Any]) -> TensorSpec:
    """A :class:`hal.ir.TensorSpec` from its record in the manifest."""
    dims: tuple[Dim, ...] | None = None if record["dims"] is None else tuple(record["dims"])
    return TensorSpec(record["name"], record["dtype"], dims, record["container"])


def _state_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: record[k] for k in ("name", "input", "output", "kind", "axes", "growth_axis")}
