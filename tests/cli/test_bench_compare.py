"""``hal bench BUNDLE --compare-float FLOAT`` and ``--against OTHER``."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from hal.cli import main
from hal.cli._bench import Case, Figures, Samples
from hal.cli._bench_compare import comparison
from tests.cli.conftest import Hal
from tests.passes.quantize.toy import language_model

QUICK = ("--rounds", 2, "--runs", 3, "--warmup", 1, "--threads", 1)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with weights of 4 bits, and the float one."""
    folder = tmp_path_factory.mktemp("pair")
    model = folder / "toy.onnx"
    model.write_bytes(ir.to_proto(language_model().stamp()).SerializeToString())
    options = ["-t", "host:onnxruntime", "--no-verify"]
    for name, more in (("float", []), ("w4", ["--quantize", "w4a16"])):
        assert (
            main(["compile", str(model), "-o", str(folder / f"{name}.hal"), *options, *more]) == 0
        )
    return folder / "w4.hal", folder / "float.hal"


def test_a_quantized_bundle_is_measured_beside_the_float_one(
    hal_command: Hal, pair: tuple[Path, Path]
) -> None:
    quantized, floats = pair
    result = hal_command("bench", quantized, "--compare-float", floats, *QUICK, "--json")
    assert result.code == 0, result.err
    assert [t["bundle"] for t in result.json["targets"]] == [str(quantized), str(floats)]
    assert all(t["runs"] == 6 for t in result.json["targets"])
    (found,) = result.json["comparison"]
    low, high = found["by_round"]
    assert 0 < low <= high
    medians = [t["latency_seconds"]["p50"] for t in result.json["targets"]]
    assert found["times_faster"] == pytest.approx(medians[1] / medians[0])
    assert found["sentence"].startswith("host:onnxruntime: quantized is ")
    shown = hal_command("bench", quantized, "--against", floats, *QUICK)
    assert shown.code == 0, shown.err
    assert "w4.hal is " in shown.out
    assert "mapped, loaded" in shown.out


def test_what_cannot_be_compared_is_refused(
    hal_command: Hal, pair: tuple[Path, Path], bundle: Path
) -> None:
    quantized, floats = pair
    result = hal_command("bench", floats, "--compare-float", quantized)
    assert (result.code, "is not quantized" in result.err) == (2, True)
    result = hal_command("bench", quantized, "--compare-float", quantized)
    assert "is quantized itself" in result.err
    result = hal_command("bench", quantized, "--compare-float", floats, "--against", bundle)
    assert "both given" in result.err
    result = hal_command("bench", quantized, "--compare-float", floats, "-t", "host:tvm")
    assert "the bundle has no build for 'host:tvm'" in result.err
    assert hal_command("bench", quantized, "--compare-float").code == 2


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ([0.5, 0.5, 0.4, 0.4], "quantized is 2.22x faster than float (2.00 to 2.50)"),
        ([2.0, 2.0, 2.0, 2.0], "quantized is 2.00x slower than float (2.00 to 2.00)"),
        ([0.5, 0.5, 1.2, 1.2], "quantized is as fast as float (0.83 to 2.00 times by round)"),
    ],
)
def test_rounds_that_disagree_are_no_gain(own: list[float], words: str) -> None:
    case = Case(0, 1)
    figures = [
        Figures("b", "host:any", 0.1, None, cases={case: Samples(seconds)})
        for seconds in (own, [1.0] * 4)
    ]
    (found,) = comparison(figures, runs=2, words=("quantized", "float"))
    assert words in found["sentence"]
