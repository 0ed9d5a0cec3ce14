from pathlib import Path
from typing import Any

import pytest

from hal import descriptor as d
from hal.errors import DescriptorError

BASE: dict[str, Any] = {"schema": 1, "name": "chip", "kind": "npu"}


def figure(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "source": "test", "confidence": "vendor"}


def problem(extra: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(DescriptorError) as caught:
        d.parse({**BASE, **extra}, "chip.toml")
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"cores": "four"}, "chip.toml: cores: input should be a valid integer (got 'four')"),
        ({"cores": "4"}, "chip.toml: cores: input should be a valid integer (got '4')"),
        (
            {"memory": [{"level": "hbm", "capacity": figure(-1, "GB")}]},
            "chip.toml: memory[0].capacity.value: must be finite and not negative, got -1.0",
        ),
        (
            {"memory": [{"level": "hbm", "bandwidth": figure(1, "GB")}]},
            "chip.toml: memory[0].bandwidth: unit 'GB' measures bytes, expected bytes per second "
            "or bytes per cycle and core (for example 'B/s')",
        ),
        (
            {"memory": [{"level": "hbm", "bandwidth": figure(1, "Gb/s")}]},
            "chip.toml: memory[0].bandwidth.unit: unknown unit 'Gb/s'; did you mean 'GB/s'?",
        ),
        (
            {"peak": {"float23": figure(1, "op/s")}},
            "chip.toml: peak.float23: unknown dtype 'float23'; did you mean 'float32'?",
        ),
        (
            {"routes": {"tvm": {"target": {}}}},
            'chip.toml: routes.tvm.target: must have a string "kind", '
            'for example { kind = "llvm" }',
        ),
        ({"routes": {"own": {}}}, "chip.toml: missing field 'routes.own.backend'"),
        (
            {"default_route": "tvm"},
            "chip.toml: default_route 'tvm' is not in [routes]; none are known",
        ),
        (
            {"memory": [{"level": "hbm"}, {"level": "hbm"}]},
            "chip.toml: memory level 'hbm' is listed twice",
        ),
        (
            {"memory": [{"level": "hbm", "bandwidth": figure(0, "GB/s")}]},
            "chip.toml: memory[0].bandwidth: a bandwidth of 0 is impossible; "
            'write "unknown" if nobody knows it',
        ),
        (
            {"peak": {"int8": figure(-3, "Top/s")}},
            "chip.toml: peak.int8.value: must be finite and not negative, got -3.0",
        ),
        (
            {"peak": {"int8": {**figure(0, "Top/s"), "basis": "dense"}}},
            'chip.toml: peak.int8: a rate of 0 is impossible; write "unknown" if nobody knows it',
        ),
        (
            {"clock": figure(0, "GHz")},
            'chip.toml: clock: a frequency of 0 is impossible; write "unknown" if nobody knows it',
        ),
        (
            {"memory": [{"level": "hbm", "bandwidth": {**figure(1, "GB/s"), "basis": "sparse"}}]},
            'chip.toml: memory[0].bandwidth: basis = "sparse" is for rates of arithmetic, '
            "not for bytes per second",
        ),
        (
            {
                "peak": {
                    "int8": {
                        **figure(624, "Top/s"),
                        "basis": "dense",
                        "alternatives": [{**figure(624, "Top/s"), "basis": "sparse"}],
                    }
                }
            },
            "chip.toml: peak.int8: 624 Top/s is given as dense and as sparse: with structured "
            "zeros a chip is faster, so one of them is wrong",
        ),
        (
            {"power": {"idle": figure(80, "W"), "maximum": figure(75, "W")}},
            "chip.toml: power: idle of 80 W is more than maximum of 75 W",
        ),
        ({"schema": 2}, "chip.toml: schema = 2 is newer than this hal reads (1)"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(extra: dict[str, Any], message: str) -> None:
    assert problem(extra)[0] == message


@pytest.mark.parametrize(
    ("extra", "field", "suggestion"),
    [
        ({"kindd": 1}, "kindd", "kind"),
        ({"memory": [{"level": "a", "bandwith": 1}]}, "memory[0].bandwith", "bandwidth"),
        ({"behaviour": {"dynamic_shape": True}}, "behaviour.dynamic_shape", "dynamic_shapes"),
        (
            {"routes": {"onnxruntime": {"providers": ["P"], "provider_option": {}}}},
            "routes.onnxruntime.provider_option",
            "provider_options",
        ),
    ],
)
def test_an_unknown_field_is_refused_with_a_suggestion(
    extra: dict[str, Any], field: str, suggestion: str
) -> None:
    message, hint = problem(extra)
    assert message == f"chip.toml: unknown field {field!r}"
    assert hint == f"did you mean {suggestion!r}?"


def test_a_missing_field_is_named() -> None:
    with pytest.raises(DescriptorError, match=r"chip\.toml: missing field 'kind'"):
        d.parse({"schema": 1, "name": "chip"}, "chip.toml")


def test_a_typo_is_told_before_the_field_it_leaves_missing() -> None:
    with pytest.raises(DescriptorError, match="unknown field 'knd'"):
        d.parse({"schema": 1, "name": "chip", "knd": "npu"}, "chip.toml")


def test_unknown_overrides_a_parents_figure() -> None:
    parent = {**BASE, "peak": {"int8": figure(1, "Top/s")}}
    child = {"schema": 1, "name": "small", "extends": "chip", "peak": {"int8": "unknown"}}
    assert d.parse(d.merge(parent, child)).peak("int8") is None


def test_merging_is_deep_and_replaces_figures_and_arrays_as_a_whole() -> None:
    parent = {
        **BASE,
        "notes": ["of the parent"],
        "memory": [
            {"level": "sram", "capacity": figure(1, "MB"), "line_bytes": 64},
            {"level": "hbm", "capacity": figure(64, "GB")},
        ],
        "instructions": [{"does": "dot", "lanes": 8, "k": 4, "types": ["u8", "i8", "i32"]}],
        "routes": {"tvm": {"target": {"kind": "llvm", "mcpu": "a", "mattr": ["+x"]}}},
    }
    child = {
        "schema": 1,
        "name": "child",
        "memory": [{"level": "sram", "capacity": {**figure(2, "MB"), "basis": "dense"}}],
        "instructions": [
            {"does": "dot", "lanes": 8, "types": ["u8", "i8", "i32"], "llvm": "llvm.dot"},
            {"does": "dot", "lanes": 16, "k": 4, "types": ["u8", "i8", "i32"]},
        ],
        "routes": {"tvm": {"target": {"mcpu": "b", "mattr": ["+y"]}}},
    }
    merged = d.parse(d.merge(parent, child))
    assert merged.name == "child"
    assert merged.notes == ()
    assert merged.cache_bytes("sram") == 2_000_000
    assert merged.memory[0].line_bytes == 64
    assert merged.memory_capacity() == 64e9
    assert [(i.lanes, i.k, i.llvm) for i in merged.instructions] == [
        (8, 4, "llvm.dot"),
        (16, 4, None),
    ]
    _, route = merged.route("tvm")
    assert isinstance(route, d.TvmRoute)
    assert route.target == {"kind": "llvm", "mcpu": "b", "mattr": ["+y"]}


def test_a_part_of_a_chain_may_lack_fields_but_not_have_wrong_ones() -> None:
    d.check_part({"schema": 1, "name": "x", "routes": {"tvm": {"target": {"mcpu": "q"}}}}, "x")
    with pytest.raises(DescriptorError, match=r"x\.toml: unknown field 'colour'"):
        d.check_part({"schema": 1, "name": "x", "colour": "red"}, "x.toml")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"name = ", "not valid TOML"), (b"\xff\xfe", "not UTF-8"), (None, "cannot be read")],
)
def test_a_file_that_is_no_toml_is_named(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "chip.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DescriptorError, match=rf"chip\.toml: {reason}"):
        d.read_toml(file)


def test_the_json_schema_lists_the_fields_of_the_file() -> None:
    schema = d.json_schema()
    assert {"schema", "name", "kind", "memory", "peak", "routes"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    assert "bandwidth" in schema["$defs"]["MemoryLevel"]["properties"]
