"""Angles of positions stay where floats are wide."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hal.descriptor import Descriptor
from hal.ir.inline import infer_types
from hal.targets import Registry
from hal.targets.angles import coarse_angles
from tests.passes.toys import Toy

TEXT = """
schema = 1
name = "chip"
extends = "cpu"
{behaviour}
"""
NARROW = """
[behaviour]
matmul_precision = "float16"
[behaviour.dtypes]
float32 = "narrowed"
float16 = "native"
"""


def chip(folder: Path, behaviour: str) -> Descriptor:
    file = folder / "chip.toml"
    file.write_text(TEXT.format(behaviour=behaviour))
    return Registry.discover("").from_file(file)


def rotary() -> Toy:
    toy = Toy()
    toy.add_input("x", [1, 3], "INT64")
    angle = toy("Mul", toy("Cast", toy.x, to=1), np.ones(3, np.float32))
    toy.output(toy("Relu", toy("Sin", angle)), "y")
    return toy


def test_steps_from_a_position_to_its_sine_are_not_for_narrow_floats(tmp_path: Path) -> None:
    graph = rotary().graph()
    infer_types(graph.model)
    found = coarse_angles(graph.graph, chip(tmp_path, NARROW))
    assert [n.op_type for n in graph.graph if n in found] == ["Cast", "Mul", "Sin"]
    assert set(found.values()) == {
        "float32 is float16 there, too coarse for the angle of a position"
    }


def test_wide_floats_take_them(tmp_path: Path) -> None:
    assert coarse_angles(rotary().graph().graph, chip(tmp_path, "")) == {}


def test_the_sine_of_what_was_no_position_is_like_any_other_op(tmp_path: Path) -> None:
    toy = Toy(x=[1, 3])
    toy.output(toy("Sin", toy("Mul", toy.x, 2.0)), "y")
    graph = toy.graph()
    infer_types(graph.model)
    assert coarse_angles(graph.graph, chip(tmp_path, NARROW)) == {}
