"""``hal eval`` and :func:`hal.evaluate` on real bundles, and what they say to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hal
from tests import models
from tests.cli.conftest import Hal, write_model

TEXT = "The for statement is used to iterate over the elements of a sequence. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Language models: ``b`` has noise in the weights and cuts texts otherwise, ``other`` is small."""
    folder = tmp_path_factory.mktemp("eval")
    for name, size in (("a", 1536), ("b", 1536), ("other", 256)):
        (folder / "source").mkdir()
        source = models.save("llama", folder / "source", vocab_size=size, num_hidden_layers=1)
        source = source.rename(folder / name)
        (folder / "source").rmdir()
        if name != "other":
            models.add_tokenizer(source)
        if name == "b":
            shake(source)
            cut_otherwise(source)
        hal.compile(source, target="host:onnxruntime", output=folder / f"{name}.hal", verify=False)
    (folder / "text.txt").write_text(TEXT)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(0, 256, 100).astype(np.int32))
    return folder


def shake(source: Path) -> None:
    from safetensors.numpy import load_file, save_file

    random = np.random.default_rng(0)
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name in sorted(tensors):
        noise = random.standard_normal(tensors[name].shape) * 0.05
        tensors[name] = tensors[name] + noise.astype(np.float32)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers")
    model = write_model(folder / "tiny.onnx")
    hal.compile(model, target="host:onnxruntime", output=folder / "tiny.hal")
    x = np.random.default_rng(0).standard_normal((37, 8)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    with hal.load(folder / "tiny.hal").session() as session:
        np.save(folder / "labels.npy", session(x).argmax(-1))
    return folder


def cut_otherwise(source: Path) -> None:
    tokenizer = source / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"] = []
    tokenizer.write_text(json.dumps(content))


# -- language models --------------------------------------------------------------------------


def test_tokens_are_scored_against_another_bundle(hal_command: Hal, folder: Path) -> None:
    arguments = ["eval", folder / "b.hal", "--tokens", folder / "ids.npy", "--window", 32]
    arguments += ["--against", folder / "a.hal"]
    result = hal_command(*arguments)
    assert result.code == 0, result.err
    for word in ("perplexity", "reference's perplexity", "KL divergence (nats)", "top-1 agreement"):
        assert word in result.out
    found = hal_command(*arguments, "--json").json
    figures = found["text"]
    other = figures["comparison"]
    assert found["target"] == found["against_target"] == "host:onnxruntime"
    assert found["window"] == 32
    assert other["kl_divergence"]["low"] <= other["kl_divergence"]["value"]
    assert 0 < other["kl_divergence"]["value"] < 1
    assert other["perplexity_ratio"]["value"] == pytest.approx(
        figures["perplexity"]["value"] / other["perplexity"]["value"]
    )
    swapped = hal.evaluate(folder / "a.hal", tokens=folder / "ids.npy", window=32).text
    assert swapped is not None
    assert swapped.perplexity.value == pytest.approx(other["perplexity"]["value"], rel=1e-6)


def test_a_text_is_cut_by_the_bundles_tokenizer(hal_command: Hal, folder: Path) -> None:
    from hal.runtime.tokenizer import Tokenizer

    ids = Tokenizer.from_bundle(hal.load(folder / "a.hal").files).encode(TEXT)
    text = hal_command("eval", folder / "a.hal", "--text", folder / "text.txt", "--json").json
    assert text["text"]["positions"] == len(ids) - 1
    assert text["window"] == 256  # the model's positions


def test_two_builds_or_the_same_bundle_may_be_compared(hal_command: Hal, folder: Path) -> None:
    found = hal_command(
        "eval",
        folder / "a.hal",
        "--tokens",
        folder / "ids.npy",
        "--against-target",
        "host:onnxruntime",
        "--json",
    ).json
    other = found["text"]["comparison"]
    assert other["kl_divergence"]["value"] == 0.0
    assert other["top1_agreement"]["value"] == 1.0
    assert found["text"]["positions"] == 99


def test_perplexity_is_that_of_the_sessions_own_logits(folder: Path) -> None:
    ids = np.load(folder / "ids.npy")
    found = hal.evaluate(folder / "other.hal", tokens=ids).text
    assert found is not None
    with hal.load(folder / "other.hal").session() as session:
        logits = session.logits(ids[:-1]).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.exp(-log_p[np.arange(99), ids[1:]].mean())
    assert found.perplexity.value == pytest.approx(expected, rel=1e-6)


def bad_language_calls(folder: Path) -> dict[str, tuple[list[Any], str]]:
    good = ["--tokens", folder / "ids.npy"]
    np.save(folder / "floats.npy", np.zeros(5))
    np.save(folder / "table.npy", np.zeros((5, 5), int))
    np.save(folder / "high.npy", np.array([1, 2, 1536]))
    np.save(folder / "one.npy", np.array([1]))
    np.save(folder / "none.npy", np.array([], int))
    np.savez(folder / "many.npz", a=np.zeros(5, int))
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    a, other = folder / "a.hal", folder / "other.hal"
    return {
        "nothing": ([a], "give exactly one of --text, --tokens and --inputs"),
        "both": ([a, *good, "--text", folder / "text.txt"], "give exactly one of"),
        "no tokenizer": ([other, "--text", folder / "text.txt"], "the bundle has no tokenizer"),
        "empty text": ([a, "--text", folder / "empty.txt"], "the text is empty"),
        "not text": ([a, "--text", folder / "latin.txt"], "is no UTF-8 text"),
        "no text": ([a, "--text", folder / "gone.txt"], "there is no such file"),
        "no tokens": ([a, "--tokens", folder / "gone.npy"], "there is no such file"),
        "not numpy": ([a, "--tokens", folder / "text.txt"], "is not a .npy file of integers"),
        "an npz": ([a, "--tokens", folder / "many.npz"], "is an .npz, not a .npy of integers"),
        "floats": ([a, "--tokens", folder / "floats.npy"], "holds float64, not integers"),
        "a table": ([a, "--tokens", folder / "table.npy"], "has shape [5, 5], not [n]"),
        "high": (
            [a, "--tokens", folder / "high.npy"],
            "token 2 is 1536: the vocabulary is 0..1535",
        ),
        "one": ([a, "--tokens", folder / "one.npy"], "1 token(s) leave none to predict"),
        "none": ([a, "--tokens", folder / "none.npy"], "is empty"),
        "vocabularies": ([a, *good, "--against", other], "different vocabularies: 1536 and 256"),
        "window": ([a, *good, "--window", 257], "the model has 256 positions"),
        "labels": ([a, *good, "--labels", folder / "ids.npy"], "labels are for models"),
        "inputs": ([a, "--inputs", folder / "many.npz"], "carries state from call to call"),
        "target": ([a, *good, "--target", "host:tvm"], "the bundle has no build for 'host:tvm'"),
    }


def test_bad_input_is_told_in_one_sentence(hal_command: Hal, folder: Path) -> None:
    for name, (arguments, message) in bad_language_calls(folder).items():
        result = hal_command("eval", *arguments)
        assert result.code == 2, name
        assert message in result.err, name
        assert "\nhint: " in result.err, name


def test_tokenizers_that_cut_a_text_differently_are_not_compared(folder: Path) -> None:
    with pytest.raises(hal.InputError, match="they cut the text differently"):
        hal.evaluate(folder / "a.hal", text=TEXT, against=folder / "b.hal")


# -- other models -----------------------------------------------------------------------------


def test_outputs_are_compared_and_accuracy_counted(hal_command: Hal, classifiers: Path) -> None:
    arguments = [
        "eval",
        classifiers / "tiny.hal",
        "--inputs",
        classifiers / "x.npz",
        "--labels",
        classifiers / "labels.npy",
        "--against",
        classifiers / "tiny.hal",
    ]
    result = hal_command(*arguments)
    assert result.code == 0, result.err
    assert "37 examples" in result.out
    assert "100.00%" in result.out
    found = hal_command(*arguments, "--json").json
    assert found["accuracy"]["value"] == found["reference_accuracy"]["value"] == 1.0
    assert found["outputs"]["y"]["cosine"]["value"] == 1.0
    assert found["outputs"]["y"]["max_error"] == 0.0
    assert found["outputs"]["y"]["top1_agreement"]["value"] == 1.0


def test_accuracy_needs_no_reference(classifiers: Path) -> None:
    labels = np.load(classifiers / "labels.npy")
    wrong = labels.copy()
    wrong[:10] = (wrong[:10] + 1) % 4
    found = hal.evaluate(
        classifiers / "tiny.hal", inputs=classifiers / "x.npz", labels=wrong
    ).accuracy
    assert found is not None
    assert found.value == pytest.approx(27 / 37)


def test_bad_examples_are_told_in_one_sentence(hal_command: Hal, classifiers: Path) -> None:
    x = np.load(classifiers / "x.npz")["x"]
    np.save(classifiers / "x.npy", x)
    np.savez(classifiers / "wide.npz", x=np.zeros((4, 9), np.float32))
    np.savez(classifiers / "empty.npz", x=np.zeros((0, 8), np.float32))
    np.savez(classifiers / "named.npz", z=x)
    np.savez(classifiers / "none.npz")
    np.save(classifiers / "few.npy", np.zeros(3, int))
    np.save(classifiers / "classes.npy", np.full(37, 4))
    good = ["--inputs", classifiers / "x.npz"]
    labels = ["--labels", classifiers / "labels.npy"]
    cases: list[tuple[list[Any], str]] = [
        (good, "there is nothing to compare the outputs with"),
        ([*good, *labels, "--window", 3], "a window is for language models"),
        (["--inputs", classifiers / "x.npy", *labels], "is a .npy, not an .npz"),
        (["--inputs", classifiers / "gone.npz", *labels], "there is no such file"),
        (["--inputs", classifiers / "tiny.onnx", *labels], "is not an .npz"),
        (["--inputs", classifiers / "wide.npz", "--labels", classifiers / "few.npy"], "3 labels"),
        (["--inputs", classifiers / "empty.npz", *labels], "the inputs hold no example"),
        (["--inputs", classifiers / "named.npz", *labels], "there is no input 'z'"),
        (["--inputs", classifiers / "none.npz", *labels], "the inputs hold no example"),
        ([*good, "--labels", classifiers / "few.npy"], "3 labels for 37 examples"),
        ([*good, "--labels", classifiers / "classes.npy"], "a label is not in 0..3"),
        (["--tokens", classifiers / "few.npy"], "is no language model"),
    ]
    for arguments, message in cases:
        result = hal_command("eval", classifiers / "tiny.hal", *arguments)
        assert result.code == 2, arguments
        assert message in result.err, (arguments, result.err)


def test_a_model_that_gives_no_numbers_fails_the_check(hal_command: Hal, classifiers: Path) -> None:
    x = np.full((2, 8), np.nan, np.float32)
    np.savez(classifiers / "nan.npz", x=x)
    result = hal_command(
        "eval",
        classifiers / "tiny.hal",
        "--inputs",
        classifiers / "nan.npz",
        "--against",
        classifiers / "tiny.hal",
    )
    assert result.code == 1
    assert "output 'y' of the model is not finite for example 0" in result.err
