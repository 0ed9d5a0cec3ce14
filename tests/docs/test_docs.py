"""What the documentation shows works: every example is run, every link and diff leads somewhere."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hal
from tests import files, models
from tests.docs.pages import ROOT, blocks, pages, run_page

NAMES = [page.relative_to(ROOT).as_posix() for page in pages()]
NEED_BUNDLE = {
    "docs/application-developers.md",
    "docs/platform-engineers.md",
    "docs/serving.md",
    "generate_text.py",
    "lm_eval_adapter.py",
    "retarget.py",
}
NOT_RUN = {
    "train_demo_model.py",  # takes minutes; made what is in examples/demo_model
    "demo_text.py",  # a part of it
    "train_reference_model.py",  # the same, of a larger model that goes to the cache
    "reference_text.py",
    "training.py",
    "train_digits.py",  # run in tests/examples
    "train_ternary.py",  # the same
    "compare_embeddings.py",
}
EXAMPLES = sorted({p.name for p in (ROOT / "examples").glob("*.py")} - NOT_RUN)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages may take for granted: ``my-model/``, a language model with a tokenizer, and
    ``model.onnx``."""
    folder = tmp_path_factory.mktemp("material")
    source = models.save("llama", folder, vocab_size=1536, num_hidden_layers=1).rename(
        folder / "my-model"
    )
    models.add_tokenizer(source)
    files.save_mlp(folder / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def bundle(material: Path) -> Path:
    """``my-model.hal``, for pages that use it without making it."""
    path = material / "my-model.hal"
    hal.compile(material / "my-model", target="host:onnxruntime", output=path)
    return path


@pytest.fixture
def workplace(
    request: pytest.FixtureRequest,
    material: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """An own copy of the material as the working directory, and nothing that leaks out of it."""
    if name in NEED_BUNDLE:
        shutil.copy(request.getfixturevalue("bundle"), tmp_path)
    shutil.copytree(material, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.hal"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HAL_TARGET_PATH", "")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_block_of_a_page_runs(name: str, workplace: Path) -> None:
    run_page(ROOT / name, workplace)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(
    name: str, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["my-model.hal"] if name in NEED_BUNDLE else []
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if link.startswith(("http:", "https:")):
            continue
        if path:
            assert ((ROOT / name).parent / path).exists(), f"{name} links to {link}"
        elif anchor:
            assert anchor in headings, f"{name} has no heading {anchor!r}"


def test_the_diffs_of_contributing_apply_and_their_tests_pass(tmp_path: Path) -> None:
    """In a copy of the repository that comes before the installed package on the path."""
    shutil.copytree(ROOT / "hal", tmp_path / "hal", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("passes", "targets", "kernels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    added: list[str] = []
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        if block.language != "diff":
            continue
        command = ["git", "apply", "-C1", "--unsafe-paths", "-"]
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            input=block.text + "\n",
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"CONTRIBUTING.md:{block.line}: {result.stderr}"
        added += re.findall(r"^\+\+\+ b/(tests/\S+)$", block.text, re.MULTILINE)
    assert len(added) == 3  # a pass, a kernel, a target
    for name in ("passes", "targets", "kernels"):
        (tmp_path / name).rename(tmp_path / "hal" / name)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *added],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
