from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hal import CheckFailed, InputError
from hal.descriptor import Descriptor
from hal.ir import Graph
from hal.passes.quantize import METADATA_KEY
from hal.quantization import parse_request, plan_of_report, quantize_graph, read_plan
from hal.quantization.data import load_calibration
from tests.passes.quantize.toy import language_model

IDS = {"ids": np.random.default_rng(0).integers(0, 96, (4, 24))}
PLAIN = Descriptor.model_validate({"schema": 1, "name": "plain", "kind": "cpu"})


def quantized(graph: Graph, quantize: str, **options: object) -> Graph:
    request = parse_request(quantize, calibration=IDS, **options)  # type: ignore[arg-type]
    assert request is not None
    return quantize_graph(graph, request, PLAIN)[0]


def test_a_tighter_bound_takes_more_bytes_and_is_kept() -> None:
    graph = language_model()
    sizes = []
    for bound in (0.9, 0.99, 0.9999):
        changed = quantized(graph, "w2a16", accuracy_budget=f"cosine>={bound}")
        assert changed.metadata[METADATA_KEY]["figures"]["cosine"] >= bound
        sizes.append(changed.weight_bytes())
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] < graph.weight_bytes()


def test_the_best_within_so_many_bytes_keeps_to_them() -> None:
    graph = language_model()
    size = graph.weight_bytes() // 4
    changed = quantized(graph, "w2a16", size_budget=size)
    assert changed.weight_bytes() <= size
    least = quantized(graph, "w2a16,head=w2a16,embedding=w2a16")
    figures = [g.metadata[METADATA_KEY]["figures"]["cosine"] for g in (changed, least)]
    assert figures[0] > figures[1]


def test_a_budget_out_of_reach_says_the_best_and_the_worst_layers() -> None:
    with pytest.raises(CheckFailed, match="at the least"):
        quantized(language_model(), "w4a16", size_budget=10_000)
    with pytest.raises(CheckFailed, match="worst layers"):
        quantized(language_model(), "w2a16", size_budget=70_000, accuracy_budget="cosine>=0.999999")


def test_a_found_plan_gives_the_same_graph_again(tmp_path: Path) -> None:
    graph = language_model()
    first = quantized(graph, "auto", accuracy_budget="cosine>=0.99")
    path = tmp_path / "plan.toml"
    path.write_text(first.metadata[METADATA_KEY]["plan"])
    again = quantized(graph, str(path))
    assert again.weight_bytes() == first.weight_bytes()
    report = first.metadata[METADATA_KEY]
    assert plan_of_report(report).layers.keys() >= read_plan(path).layers.keys()


@pytest.mark.parametrize(
    "given",
    [{}, {"ids": np.zeros((0, 4), np.int64)}, {"ids": np.zeros((2, 4), np.float32)},
     {"idz": np.zeros((2, 4), np.int64)}, np.zeros((2, 4), np.float32)],
)  # fmt: skip
def test_data_that_does_not_fit_the_model_is_refused(given: object) -> None:
    with pytest.raises(InputError) as caught:
        load_calibration(given, language_model(), None)
    assert caught.value.hint


def test_files_that_are_no_data_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK nothing")
    for path in (text, broken, tmp_path, tmp_path / "gone.npy"):
        with pytest.raises(InputError):
            load_calibration(path, language_model(), None)
