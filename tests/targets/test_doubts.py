"""What looks wrong in a descriptor is warned of with what was seen, and what is right is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hal import descriptor as d
from hal.cli import main
from hal.targets import Registry
from hal.targets.doubts import doubts


def figure(value: float, unit: str, source: str = "data sheet", **more: Any) -> dict[str, Any]:
    return {"value": value, "unit": unit, "source": source, "confidence": "vendor", **more}


def dense(value: float, source: str = "data sheet", **more: Any) -> dict[str, Any]:
    return figure(value, "Top/s", source, basis="dense", **more)


def chip(kind: str = "npu", **extra: Any) -> d.Descriptor:
    return d.parse({"schema": 1, "name": "chip", "kind": kind, **extra})


def test_nothing_in_the_library_is_doubted() -> None:
    registry = Registry.discover("")
    names = registry.names()
    assert len(names) > 50
    assert {name: found for name in names if (found := doubts(registry.descriptor(name)))} == {}


@pytest.mark.parametrize(
    ("memory", "warning"),
    [
        (
            [{"level": "hbm", "bandwidth": figure(64, "GB/s", "PCIe 5.0 x16, table 3")}],
            "memory level 'hbm': the source of its bandwidth speaks of 'PCIe': is 64 GB/s that of "
            "a link and not of memory?",
        ),
        (
            [{"level": "nvlink", "bandwidth": figure(900, "GB/s")}],
            "memory level 'nvlink' is named as the link 'nvlink'; if it is one, say kind = \"link\"",
        ),
        (
            [
                {"level": "hbm", "bandwidth": figure(0.392, "TB/s")},
                {"level": "hccs", "kind": "link", "bandwidth": figure(392, "GB/s")},
            ],
            "memory level 'hbm': its bandwidth of 0.392 TB/s is that of the link 'hccs': "
            "is it that of memory?",
        ),
    ],
)
def test_the_bandwidth_of_a_link_as_that_of_memory(
    memory: list[dict[str, Any]], warning: str
) -> None:
    assert doubts(chip(memory=memory)) == [warning]


@pytest.mark.parametrize(
    "memory",
    [
        [{"level": "link", "kind": "link", "bandwidth": figure(64, "GB/s", "PCIe 5.0 x16")}],
        [{"level": "dram", "bandwidth": figure(64, "GB/s", "8 channels, specific to the board")}],
        [
            {"level": "hbm", "bandwidth": figure(1.64, "TB/s")},
            {"level": "board", "kind": "link", "bandwidth": figure(2.3, "TB/s")},
        ],
    ],
)
def test_links_that_are_links_are_not_doubted(memory: list[dict[str, Any]]) -> None:
    assert doubts(chip(memory=memory)) == []


@pytest.mark.parametrize(
    ("peak", "warning"),
    [
        (
            {"int8": dense(1248, "table 1, with sparsity")},
            "peak.int8: 1248 Top/s is given as dense, and its source speaks of 'sparsity': if "
            'zeros are counted, say basis = "sparse"',
        ),
        (
            {"int8": figure(1248, "Top/s", "table 1, 2:4")},
            "peak.int8: 1248 Top/s is given without a basis, and its source speaks of '2:4': if "
            'zeros are counted, say basis = "sparse"',
        ),
        (
            {"int8": dense(1248, alternatives=[dense(624, "a test")])},
            "peak.int8: 1248 Top/s is given as dense, twice the 624 Top/s of another source "
            "(a test): does it count sparsity?",
        ),
        (
            {"float16": dense(312), "int8": dense(1248)},
            "peak.int8: 1248 Top/s is given as dense and is four times peak.float16 (312 Top/s), "
            "where twice is usual: does it count sparsity?",
        ),
    ],
)
def test_a_sparse_rate_as_a_dense_one(peak: dict[str, Any], warning: str) -> None:
    assert doubts(chip(peak=peak)) == [warning]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("gpu", {"float16": dense(312), "int8": dense(624), "int4": dense(1248)}),
        ("gpu", {"float16": dense(312), "int8": figure(1248, "Top/s", basis="sparse")}),
        ("gpu", {"int8": dense(624, "half of the sparse rate")}),
        ("gpu", {"int8": dense(624, alternatives=[dense(1248, "others")])}),
        ("cpu", {"float16": dense(4), "int8": dense(16)}),
        (
            "gpu",
            {
                "float16": dense(165),
                "int8": dense(660),
                "float8": dense(330, alternatives=[dense(660, "with sums in float16")]),
            },
        ),
    ],
)
def test_rates_that_can_be_are_not_doubted(kind: str, peak: dict[str, Any]) -> None:
    assert doubts(chip(kind, peak=peak)) == []


TOML = """
schema = 1
name = "chip"
kind = "npu"
[[memory]]
level = "hbm"
bandwidth = { value = 64, unit = "GB/s", source = "PCIe 5.0 x16", confidence = "vendor" }
[routes.onnxruntime]
providers = ["CPUExecutionProvider"]
"""


@pytest.mark.parametrize("command", ["validate", "show"])
def test_the_commands_print_warnings_and_succeed(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "chip.toml"
    file.write_text(TOML)
    assert main(["targets", command, str(file)]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: "))
    assert line.endswith("is 64 GB/s that of a link and not of memory?")
    assert main(["targets", command, str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    warnings = found["valid"][0]["warnings"] if command == "validate" else found["warnings"]
    assert len(warnings) == 1
    assert warnings[0] in line
