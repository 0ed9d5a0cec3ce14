"""Budgets, ``auto`` and plans on a convolutional network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hal.descriptor import Descriptor
from hal.ir import Graph
from hal.passes.quantize import METADATA_KEY
from hal.quantization import parse_request, plan_of_report, quantize_graph
from hal.quantization.driver import integer_kernels
from tests.passes.quantize.cnn import images, network

DATA = {"x": images(16)}


def chip(*instructions: dict[str, object]) -> Descriptor:
    return Descriptor.model_validate(
        {"schema": 1, "name": "chip", "kind": "cpu", "instructions": instructions}
    )


def dot(first: str, does: str = "dot", last: str = "i32", k: int = 4) -> dict[str, object]:
    return {"does": does, "lanes": 8, "k": k, "types": (first, "i8", last), "llvm": "llvm.x"}


def quantized(graph: Graph, recipe: str, target: Descriptor | None = None, **more: str) -> Graph:
    request = parse_request(recipe, calibration=DATA, **more)
    assert request is not None
    return quantize_graph(graph, request, target or chip())[0]


def formats(graph: Graph) -> list[str]:
    return [layer["format"] for layer in graph.metadata[METADATA_KEY]["layers"]]


def test_a_budget_that_static_activations_keep_takes_them_everywhere() -> None:
    changed = quantized(network(), "w8a8", accuracy_budget="top1>=0.8,cosine>=0.99")
    assert set(formats(changed)) == {"w8a8-channel-static"}
    assert changed.metadata[METADATA_KEY]["samples"] == 16


def test_a_tighter_budget_gives_some_layers_their_activations_back(tmp_path: Path) -> None:
    changed = quantized(network(), "w8a8", accuracy_budget="cosine>=0.99999")
    found = formats(changed)
    assert len(set(found)) > 1
    assert changed.metadata[METADATA_KEY]["figures"]["cosine"] >= 0.99999
    path = tmp_path / "plan.toml"
    path.write_text(changed.metadata[METADATA_KEY]["plan"])
    assert formats(quantized(network(), str(path))) == found
    plan = plan_of_report(changed.metadata[METADATA_KEY])
    assert plan.layers.keys() == {x["name"] for x in changed.metadata[METADATA_KEY]["layers"]}


@pytest.mark.parametrize("integers", [True, False])
def test_auto_rounds_activations_where_the_target_multiplies_bytes(integers: bool) -> None:
    changed = quantized(network(), "auto", chip(dot("u8")) if integers else chip())
    assert ("w8a8-channel-static" in formats(changed)) == integers
    assert changed.metadata[METADATA_KEY]["figures"]["cosine"] >= 0.999


@pytest.mark.parametrize(
    ("instructions", "activations", "highest"),
    [
        ((), "uint8", 127),
        ((dot("u8"),), "uint8", 127),
        ((dot("i8"),), "int8", 127),
        ((dot("u8", "dot_saturating", "i16", 2),), "uint8", 63),
        ((dot("u8", "dot_saturating", "i16", 2), dot("u8")), "uint8", 127),
    ],
)
def test_codes_are_what_the_instructions_of_a_target_multiply(
    instructions: tuple[dict[str, object], ...], activations: str, highest: int
) -> None:
    found = integer_kernels(chip(*instructions))
    assert (found.activations, found.highest) == (activations, highest)


def test_an_npz_of_images_calibrates(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **DATA)
    request = parse_request("w8a8", calibration=tmp_path / "data.npz")
    assert request is not None
    changed, _ = quantize_graph(network(), request, chip())
    assert set(formats(changed)) == {"w8a8-channel-static"}
