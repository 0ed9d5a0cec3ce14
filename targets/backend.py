"""What a backend is: the six calls through which a chip's software meets hal.

A backend never edits the graph it is given. Claims are made node by node; the planner
(:mod:`hal.targets.partition`) turns them into convex segments, gives what is not claimed to the
host backend, and calls :meth:`Backend.build` once for each segment.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hal.descriptor import Descriptor, Route
from hal.errors import UnsupportedError
from hal.ir.step import free_dims, required

if TYPE_CHECKING:
    import onnx_ir as ir

    from hal.ir import Graph
    from hal.targets.reading import WeightReads

HAL_API = "1"
"""Version of this contract. A backend that states another is refused with a clear message."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Whether a backend can run here, and why.

    ``present``, ``simulator``, ``absent``, or ``builds``: it builds here what runs elsewhere.
    """

    status: str
    reason: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Answer to "can you run this node?"; ``reason`` is set when the answer is no."""

    claimed: bool
    reason: str = ""

    @classmethod
    def yes(cls) -> Verdict:
        """The node is claimed."""
        return cls(True)

    @classmethod
    def no(cls, reason: str) -> Verdict:
        """The node is refused, and why."""
        return cls(False, reason)


class WeightStore(abc.ABC):
    """Files of a bundle as a backend sees them; a directory or a zip, always memory-mapped."""

    @abc.abstractmethod
    def locate(self, relative: str) -> tuple[Path, int, int]:
        """Real file, byte offset and length that hold the member ``relative``."""

    @abc.abstractmethod
    def mapped(self, relative: str) -> memoryview:
        """The member's bytes, memory-mapped read-only."""

    @abc.abstractmethod
    def extracted(self, relative: str) -> Path:
        """A real path with the member's bytes (itself in a directory, a cached copy for a zip)."""


@dataclasses.dataclass(frozen=True)
class BuildContext:
    """Where and for what a segment is built.

    ``folder`` exists and is the segment's own; ``bundle`` is the bundle's root, against which
    external weight locations are relative. Weights that a backend repacks go into ``folder``.
    """

    descriptor: Descriptor
    folder: Path
    bundle: Path
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LoadContext:
    """Where a built segment is loaded from. ``folder`` is relative to the bundle's root."""

    descriptor: Descriptor
    folder: str
    files: WeightStore
    threads: int | None = None


class Executable(abc.ABC):
    """A loaded segment. Not thread-safe; arrays in and out are numpy."""

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run once. Keys are the segment's value names; carried state is passed explicitly.

        Pools of a cache (:func:`hal.ir.cache_plan.in_place`) are NumPy arrays that begin on a
        64-byte boundary; they are written in place, and come out as the same arrays.
        """

    def forget_state(self) -> None:  # noqa: B027  (most segments keep nothing)
        """Pools that the next call is given were changed by others: a copy of them is outdated."""

    def close(self) -> None:  # noqa: B027  (most segments hold nothing)
        """Release what the segment holds."""


def require_static(graph: Graph, descriptor: Descriptor) -> None:
    """For chips whose programs have static shapes.

    Raises:
        UnsupportedError: an input has a dynamic dim; the text lists all of them with their
            meaning, the hint says how to give them extents.
    """
    if free_dims(graph):
        raise required(graph, descriptor.name)


class Backend(abc.ABC):
    """Base class of backends; found through the entry-point group ``hal.backends``."""

    name: ClassVar[str]
    hal_api: ClassVar[str] = HAL_API

    @abc.abstractmethod
    def probe(self) -> Probe:
        """Say whether the backend can run here. Never raises."""

    def check_route(self, route: Route) -> str:
        """What is wrong with a descriptor's route, in a sentence, or nothing.

        `hal targets validate` asks. What only another machine can know is not wrong.
        """
        return ""

    def static_shapes(self, descriptor: Descriptor) -> bool:
        """Whether programs have static shapes only, so that dynamic dims need extents."""
        return not descriptor.behaviour.dynamic_shapes

    def cannot_run(self, descriptor: Descriptor) -> str:
        """Why what is built for a target does not run here, in a phrase; empty if it does.

        Such a build is not compared with the reference when it is made.
        """
        return ""

    def setup(self, descriptor: Descriptor, say: Callable[[str], None]) -> Path | None:
        """Install what a target needs beyond Python packages of this environment; say what happens.

        Returns the folder where it is, or None where there is nothing to do.

        Raises:
            TargetError: it cannot be had.
        """
        return None

    def legalize(self, graph: Graph, descriptor: Descriptor) -> Graph:
        """Rewrite a clone of the neutral graph into what this backend prefers to run.

        Inputs, outputs and state keep their names. Called once, before claims are made.
        """
        return graph

    def weights_read(self, graph: Graph) -> WeightReads | None:
        """What a call of a graph that :meth:`legalize` returned reads of weights.

        None where the backend cannot tell: nothing is predicted then.
        """
        return None

    @abc.abstractmethod
    def supports(self, node: ir.Node, descriptor: Descriptor) -> Verdict:
        """Claim one node of the legalized graph (its subgraphs included) or say why not."""

    @abc.abstractmethod
    def build(self, graph: Graph, context: BuildContext) -> dict[str, Any]:
        """Compile a segment into ``context.folder``; return the JSON record for :meth:`load`."""

    @abc.abstractmethod
    def load(self, record: Mapping[str, Any], context: LoadContext) -> Executable:
        """Load what :meth:`build` wrote.

        Raises:
            TargetError: the segment cannot run on this machine.
        """

    def page(
        self,
        record: Mapping[str, Any],
        context: LoadContext,
        folder: Path,
        name: str,
        ranges: Mapping[str, tuple[int, int]],
    ) -> None:
        """Write a segment that is a whole model as a static page for browsers, ``hal page``.

        Args:
            record: what :meth:`build` returned.
            context: where the segment lies.
            folder: exists and is empty; its ``index.html`` is the page.
            name: of the model.
            ranges: for integer inputs, the least value that makes sense and the one after the last.

        Raises:
            UnsupportedError: a browser cannot run what this backend builds.
        """
        raise UnsupportedError(
            f"what the backend {self.name!r} builds does not run in a browser",
            "choose a target whose programs do; see docs/edge-developers.md",
        )
