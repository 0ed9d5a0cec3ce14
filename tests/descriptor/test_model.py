from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal import descriptor as d
from hal.errors import DescriptorError


def figure(value: float, unit: str, **more: Any) -> dict[str, Any]:
    return {"value": value, "unit": unit, "source": "test", "confidence": "vendor", **more}


def chip(**extra: Any) -> d.Descriptor:
    return d.parse({"schema": 1, "name": "chip", "kind": "npu", **extra})


def test_what_nobody_knows_is_none() -> None:
    bare = chip()
    assert bare.memory_bandwidth() is None
    assert bare.memory_capacity() is None
    assert bare.peak("int8") is None
    assert bare.seconds(1e9, 1e9, "int8") is None
    assert bare.vector_lanes("float32") == 1
    assert bare.instruction("dot") is None
    assert bare.behaviour.support("float16") is None


def test_main_memory_is_the_last_main_level_and_never_a_cache_or_a_link() -> None:
    levels = [
        {"level": "l2", "kind": "cache", "capacity": figure(1, "MiB")},
        {"level": "hbm", "capacity": figure(64, "GB"), "bandwidth": figure(1.6, "TB/s")},
        {"level": "board link", "kind": "link", "bandwidth": figure(400, "GB/s")},
    ]
    described = chip(memory=levels)
    assert described.memory_bandwidth() == pytest.approx(1.6e12)
    assert described.memory_bandwidth("board link") == pytest.approx(4e11)
    assert described.cache_bytes("l2") == 2**20


def test_what_a_move_from_the_host_costs_is_the_ways_share_of_the_memorys_speed() -> None:
    hbm = {"level": "hbm", "bandwidth": figure(1.6, "TB/s")}
    way = {"level": "host", "kind": "link", "bandwidth": figure(64, "GB/s")}
    assert chip().move_cost() == 1.0
    assert chip(memory=[hbm]).move_cost() == 1.0
    assert chip(memory=[hbm, way]).move_cost() == pytest.approx(25.0)
    assert chip(memory=[hbm, {**way, "bandwidth": figure(3, "TB/s")}]).move_cost() == 1.0


def test_peak_per_cycle_and_core_is_multiplied_out() -> None:
    described = chip(
        cores=4, clock=figure(2, "GHz"), peak={"float32": figure(32, "flop/cycle/core")}
    )
    assert described.peak("float32") == pytest.approx(4 * 2e9 * 32)


def test_a_sparse_figure_counts_half() -> None:
    described = chip(peak={"int8": figure(100, "Top/s", basis="sparse")})
    assert described.peak("int8") == pytest.approx(5e13)


def test_a_narrower_vector_unit_offers_less() -> None:
    entries = [
        {"does": "fma", "lanes": 16, "types": ["f32", "f32", "f32"], "llvm_features": ["+wide"]},
        {"does": "fma", "lanes": 8, "types": ["f32", "f32", "f32"], "llvm_features": ["+half"]},
        {"does": "dot", "lanes": 8, "k": 4, "types": ["i8", "i8", "i32"], "vector_bits": 512},
        {"does": "matrix", "lanes": 256, "k": 64, "types": ["i8", "i8", "i32"]},
        {"does": "reduce", "lanes": 64},
    ]

    def offered(bits: int) -> list[int]:
        described = chip(vector={"bits": bits}, instructions=entries)
        return [i.lanes for i in described.offered()]

    assert offered(512) == [16, 8, 8, 256, 64]
    assert offered(256) == [8, 256, 64]
    assert offered(0) == [16, 8, 8, 256, 64]  # nobody said how wide
    assert chip(vector={"bits": 256}, instructions=entries).llvm_features() == ("+half",)


def test_an_instruction_is_offered_only_with_its_features() -> None:
    dots = [
        {"does": "dot", "lanes": 16, "k": 4, "types": ["u8", "i8", "i32"], "requires": ["dot4"]},
        {"does": "dot", "lanes": 8, "k": 4, "types": ["u8", "i8", "i32"]},
        {"does": "dot", "lanes": 8, "k": 2, "types": ["bf16", "bf16", "f32"]},
    ]
    without, having = chip(instructions=dots), chip(instructions=dots, features=["dot4"])
    narrow = without.instruction("dot", types=("u8", "i8", "i32"))
    wide = having.instruction("dot", types=("u8", "i8", "i32"))
    assert narrow is not None
    assert wide is not None
    assert (narrow.lanes, wide.lanes) == (8, 16)
    assert without.instruction("dot", k=2) is not None
    assert without.instruction("matrix") is None


def test_instructions_raise_the_peak() -> None:
    dot = {
        "does": "dot",
        "lanes": 16,
        "k": 4,
        "types": ["u8", "i8", "i32"],
        "rate": figure(2, "1/cycle"),
    }
    described = chip(instructions=[dot], peak={"int8": figure(64, "op/cycle/core")})
    assert described.peak_per_cycle("int8") == 256


@given(st.floats(1, 1e15), st.floats(1, 1e15))
def test_seconds_is_the_larger_of_moving_and_computing(moved: float, operations: float) -> None:
    described = chip(
        memory=[{"level": "hbm", "bandwidth": figure(100, "GB/s")}],
        peak={"int8": figure(50, "Top/s")},
    )
    expected = max(moved / 1e11, operations / 5e13)
    assert described.seconds(moved, operations, "int8") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bits", "dtype", "lanes"),
    [(512, "float32", 16), (256, "int8", 32), (128, "float64", 2), (0, "int8", 1)],
)
def test_lanes_follow_from_the_vector_width(bits: int, dtype: str, lanes: int) -> None:
    assert chip(vector={"bits": bits}).vector_lanes(dtype) == lanes


def test_stated_lanes_win() -> None:
    described = chip(vector={"bits": 512, "lanes": {"float16": 16}})
    assert described.vector_lanes("float16") == 16


def test_a_route_is_chosen_by_name_by_default_or_by_order() -> None:
    routes = {
        "onnxruntime": {"providers": ["SomeProvider"]},
        "tvm": {"target": {"kind": "llvm"}},
        "own": {"backend": "vendor", "level": 3},
    }
    assert chip(routes=routes).route()[0] == "onnxruntime"
    described = chip(routes=routes, default_route="own")
    name, route = described.route()
    assert (name, route.backend) == ("own", "vendor")
    assert isinstance(route, d.PluginRoute)
    assert route.options == {"level": 3}
    with pytest.raises(DescriptorError, match="target 'chip' has no route 'tmv'") as caught:
        described.route("tmv")
    assert caught.value.hint == "did you mean 'tvm'?"
    with pytest.raises(DescriptorError, match="has no route: nothing can compile for it"):
        chip().route()


def test_a_descriptor_survives_writing_and_reading() -> None:
    described = chip(
        cores=2,
        peak={"int8": None},
        memory=[{"level": "hbm", "capacity": figure(1, "GB", basis="dense")}],
        routes={"fast": {"backend": "tvm", "target": {"kind": "llvm"}}},
        behaviour={"int64": "narrowed", "dtypes": {"float16": "native"}},
    )
    again = d.parse(described.to_dict())
    assert again == described
    assert again.digest() == described.digest()
    assert again.behaviour.support("int64") == "narrowed"


def test_the_digest_changes_with_any_figure() -> None:
    assert chip(cores=2).digest() != chip(cores=3).digest()


def test_a_descriptor_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        chip().name = "other"


@pytest.mark.parametrize(
    ("behaviour", "computed"),
    [
        ({}, "float32"),
        ({"matmul_precision": "tfloat32", "dtypes": {"float32": "native"}}, "float32"),
        ({"matmul_precision": "float16", "dtypes": {"float32": "emulated"}}, "float32"),
        ({"matmul_precision": "float16", "dtypes": {"float32": "narrowed"}}, "float16"),
        ({"dtypes": {"float32": "narrowed", "bfloat16": "native"}}, "bfloat16"),
        ({"dtypes": {"float32": "narrowed"}}, "float32"),
    ],
)
def test_only_a_narrowed_float_is_computed_in_another(
    behaviour: dict[str, Any], computed: str
) -> None:
    assert chip(behaviour=behaviour).behaviour.computed_in("float32") == computed
    assert chip(behaviour=behaviour).behaviour.computed_in("int64") == "int64"


def test_backends_read_the_route_that_was_named() -> None:
    described = chip(
        routes={
            "onnxruntime": {"providers": ["CPUExecutionProvider"]},
            "small": {"backend": "vendor", "options": {"size": 1}},
            "large": {"backend": "vendor", "options": {"size": 2}},
        }
    )
    assert (described.route_through("vendor") or [""])[0] == "small"
    assert (described.with_route("large").route_through("vendor") or [""])[0] == "large"
    assert (described.with_route("large").route_through("onnxruntime") or [""])[0] == "onnxruntime"
    assert described.with_route(None) == described
    assert described.route_through("tvm") is None
    with pytest.raises(DescriptorError, match="has no route 'larger'"):
        described.with_route("larger")
