"""From the words of a user to a quantized graph: what is held, said and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hal.errors import CheckFailed, InputError
from hal.ir import Graph
from hal.ir.evaluate import evaluate
from hal.passes.quantize import METADATA_KEY
from hal.passes.quantize.gptq import gptq
from hal.quantization import parse_request, quantize_graph
from hal.quantization.judge import Judge
from hal.targets import resolve
from tests.passes.toys import Toy


def network(scale: float = 1.0, columns: int = 80) -> Graph:
    """Two products: ``first`` and, since it makes the result, a head."""
    toy = Toy(x=["batch", columns])
    rng = np.random.default_rng(0)
    first = (rng.standard_normal((columns, 96)) * scale).astype(np.float32)
    hidden = toy("Relu", toy("MatMul", toy.x, toy.constant(first)))
    toy.output(toy("MatMul", hidden, toy.weight(96, 64)))
    return toy.graph()


def data(columns: int = 80) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((32, columns)).astype(np.float32)}


def run(
    graph: Graph, quantize: Any, calibration: Any = None, folder: Path | None = None, **budget: Any
) -> tuple[Graph, list[str]]:
    said: list[str] = []
    request = parse_request(quantize, calibration=calibration, **budget)
    assert request is not None
    target = resolve("host:onnxruntime")
    made, _ = quantize_graph(graph, request, target.descriptor, say=said.append, folder=folder)
    return made, [text for text in said if text.startswith("note:")]


def formats(graph: Graph) -> dict[str, str]:
    return {x["kind"]: x["format"] for x in graph.metadata[METADATA_KEY]["layers"]}


def test_a_budget_holds_what_the_recipe_names() -> None:
    made, _ = run(network(), "w4a16,head=float", data(), accuracy_budget="cosine>=0.9")
    assert formats(made) == {"linear": "w4a16-g32", "head": "float"}
    made, _ = run(network(), "w4a16,head=w8a16", data(), accuracy_budget="cosine>=0.5")
    assert formats(made)["head"] == "w8a16-g32"
    made, _ = run(network(), "w4a16", data(), accuracy_budget="cosine>=0.5")
    assert formats(made)["head"] == "w4a16-g32"  # not named: as low as the rest


def test_a_budget_holds_what_a_plan_names(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    layers = [x["name"] for x in run(network(), "w4a16")[0].metadata[METADATA_KEY]["layers"]]
    plan.write_text(f'recipe = "w4a16"\n[layers]\n"{layers[1]}" = "w8a16-channel"\n')
    made, _ = run(network(), plan, data(), size_budget="25kB")
    assert formats(made)["head"] == "w8a16-channel"
    with pytest.raises(CheckFailed, match="9,000 are allowed; the largest layers are"):
        run(network(), plan, data(), size_budget="9kB")


def test_a_budget_that_floats_meet_leaves_floats_and_says_so() -> None:
    made, notes = run(network(), "w4a16", data(), size_budget="300MB")
    assert METADATA_KEY not in made.metadata
    assert "note: nothing is quantized: floats are what meets 300,000,000 bytes" in notes
    with pytest.raises(InputError, match="keeps all 2 layers as they are"):
        run(network(), "float")


def test_a_missed_budget_names_both_limits() -> None:
    with pytest.raises(CheckFailed, match=r"not met within 9,000 bytes: the best found has cosine"):
        run(network(), "w4a16", data(), size_budget="9kB", accuracy_budget="cosine>=0.9999")


@pytest.mark.parametrize(("scale", "word"), [(1e-12, "small"), (1e8, "large")])
def test_weights_beyond_the_scales_stay_floats(scale: float, word: str) -> None:
    made, _ = run(network(scale), "w4a16", data())
    first = made.metadata[METADATA_KEY]["layers"][0]
    assert first["format"] == "float"
    assert f"too {word} for scales of float16" in first["reason"]


def test_a_result_of_nothing_is_not_like_one_of_something() -> None:
    graph = network()
    judge = Judge(graph, [data()])
    names = [v.name for v in graph.graph.initializers.values() if v.shape == (80, 96)]
    lost = judge.weights({names[0] or "": np.zeros((80, 96), np.float32)})
    assert lost["cosine"] == 0


def test_what_a_recipe_names_in_vain_is_said() -> None:
    _, notes = run(network(), "w4a16,conv=w8a16")
    assert any(
        "conv=w8a16-channel:rtn is not used: the model has no such layers" in n for n in notes
    )


def test_activations_that_stay_are_said_with_the_reason() -> None:
    made, _ = run(network(), "w4a8")
    first = made.metadata[METADATA_KEY]["layers"][0]
    assert first["format"] == "w4a16-g32"
    assert first["reason"] == "inputs of 80 are no whole blocks of 32"


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, ...]] = []

    def once(weight: np.ndarray, *rest: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(weight.shape)
        return gptq(weight, *rest)

    recipe = "w4a16:gptq,head=w4a16:gptq"
    monkeypatch.setattr("hal.passes.quantize.quantize.gptq", once)
    with pytest.raises(KeyboardInterrupt):
        run(network(), recipe, data(), folder=tmp_path)
    again: list[tuple[int, ...]] = []

    def noted(weight: np.ndarray, *rest: Any) -> Any:
        again.append(weight.shape)
        return gptq(weight, *rest)

    monkeypatch.setattr("hal.passes.quantize.quantize.gptq", noted)
    made, _ = run(network(), recipe, data(), folder=tmp_path)
    assert done == [(96, 80)]
    assert again == [(64, 96)]
    assert set(formats(made).values()) == {"w4a16-g32"}


def test_files_are_looked_at_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("ärger".encode("utf-16"))
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", x=np.array([{}, None], object))
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 3), np.float32))
    for name, words in {
        "latin.txt": "is no UTF-8 text",
        "blank.txt": "is empty",
        "text.npz": "is not a .npy or .npz file$",
        "objects.npz": "no array of numbers",
        "none.npz": "is empty",
    }.items():
        with pytest.raises(InputError, match=words):
            parse_request("w4a16:gptq", calibration=str(tmp_path / name))


@pytest.mark.parametrize("text", ["w4a16-g32-g64", "w4a16-sym-asym", "w4a16,head=float,head=w8a16"])
def test_recipes_that_contradict_themselves_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"says both|names head twice"):
        parse_request(text)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_weight_that_stays_a_float_is_left_as_it_is(method: str) -> None:
    toy = Toy(x=["batch", 64])
    ids = toy.add_input("ids", ["batch"], "INT64")
    table = toy.constant(
        np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32) * 1e8
    )
    scaled = toy("Mul", toy.x, toy.constant(np.linspace(0.1, 9, 64, dtype=np.float32)))
    other = toy("MatMul", scaled, toy.weight(64, 80))
    toy.output(other, "other")
    toy.output(toy("Add", toy("Gather", table, ids), toy.x), "looked_up")
    toy.output(toy("MatMul", scaled, toy("Transpose", table, perm=[1, 0])), "y")
    graph = toy.graph()
    given = {
        "x": np.random.default_rng(1).standard_normal((32, 64)).astype(np.float32),
        "ids": np.arange(32, dtype=np.int64),
    }
    made, _ = run(graph, f"w4a16:{method},head=w4a16:{method}", given)
    assert "float" in {x["format"] for x in made.metadata[METADATA_KEY]["layers"]}
    before, after = evaluate(graph, given), evaluate(made, given)
    for name in ("looked_up", "y"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-5)
    assert not np.array_equal(after["other"], before["other"])


@pytest.mark.parametrize("method", ["awq", "smooth", "gptq"])
def test_data_whose_squares_exceed_floats_is_refused(method: str) -> None:
    huge = {"x": data()["x"] * np.float32(1e25)}
    with pytest.raises(InputError, match="exceed float32"):
        run(network(), f"w8a8:{method}" if method == "smooth" else f"w4a16:{method}", huge)


def test_data_that_does_not_vary_is_told() -> None:
    _, said = run(network(), "w4a16", {"x": np.full((32, 80), 0.5, np.float32)})
    assert any("0.5 everywhere" in text for text in said)
    _, said = run(network(), "w4a16", data())
    assert not any("everywhere" in text for text in said)


def test_a_graph_that_gives_no_numbers_is_refused_where_asked() -> None:
    graph = network()
    judge = Judge(graph, [data()])
    broken = network(scale=np.inf)
    assert judge.graph(broken)["cosine"] == 0
    with pytest.raises(CheckFailed, match="NaN or infinities"):
        judge.graph(broken, strict=True)
