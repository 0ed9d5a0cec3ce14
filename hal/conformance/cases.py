"""ONNX's own backend test-suite, which ships in the ``onnx`` wheel, as cases."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.runner import Runner


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and inputs with the outputs that it must give."""

    name: str
    model: onnx.ModelProto
    data: Callable[[], Iterable[tuple[Sequence[Any], Sequence[Any]]]]
    rtol: float
    atol: float

    @property
    def op(self) -> str:
        """What the case is about: its first node's op, or ``model``."""
        nodes = self.model.graph.node
        if not nodes or len({n.op_type for n in nodes}) > 8:
            return "model"
        return f"{nodes[0].domain}::{nodes[0].op_type}" if nodes[0].domain else nodes[0].op_type


def node_cases(modules: Sequence[str] | None = None) -> list[Case]:
    """The cases of single operators.

    ``modules`` (file names in ``onnx.backend.test.case.node``) loads only those, which is quick;
    all of them take about 15 seconds to generate.
    """
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # One by one even for all of them: afterwards nothing tells which module a case is from.
        walk = pkgutil.walk_packages(node.__path__, f"{node.__name__}.")
        names = modules or [m.name.removeprefix(f"{node.__name__}.") for m in walk]
        found = [case for name in names for case in _cases_of(name)]
    return [_node_case(case) for case in found]


@functools.cache
def _cases_of(module: str) -> list[TestCase]:
    """A module adds its cases to one list, when it is imported for the first time."""
    from onnx.backend.test.case import node

    before = len(node._NodeTestCases)
    importlib.import_module(f"onnx.backend.test.case.node.{module}")
    return node._NodeTestCases[before:]


def _node_case(case: TestCase) -> Case:
    assert case.model is not None
    assert case.data_sets is not None
    sets = case.data_sets
    return Case(case.name, case.model, lambda: sets, case.rtol, case.atol)


def light_cases() -> list[Case]:
    """The well-known image classifiers, with constant weights generated inside the model."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return [_light_case(path) for path in sorted(folder.glob("light_*.onnx"))]


def _light_case(path: Path) -> Case:
    model = onnx.load(path)

    def data() -> list[tuple[list[Any], list[Any]]]:
        weights = {t.name for t in model.graph.initializer}
        inputs = [Runner.generate_dummy_data(v) for v in model.graph.input if v.name not in weights]
        expected = onnx.load_tensor(path.with_name(f"{path.stem}_output_0.pb"))
        return [(inputs, [onnx.numpy_helper.to_array(expected)])]

    return Case(path.stem, model, data, 1e-3, 1e-7)
