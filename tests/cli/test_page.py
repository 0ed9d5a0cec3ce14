from pathlib import Path

import pytest

pytest.importorskip("tvm")

import hal
from tests.bundle.test_page import engine, model
from tests.cli.conftest import Hal


@pytest.fixture
def bundle_with_page(tmp_path: Path) -> Path:
    output = tmp_path / "b.hal"
    hal.compile(model(tmp_path), target=engine(tmp_path), output=output, verify=False)
    return output


def test_page_writes_a_folder_and_says_how_to_see_it(
    hal_command: Hal, bundle_with_page: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    result = hal_command("page", bundle_with_page, "-o", site)
    assert result.code == 0, result.err
    assert f"engine:c: wrote {site}" in result.out
    assert "model.wasm" in result.out
    assert f"python -m http.server --directory {site}" in result.out
    assert (site / "index.html").is_file()


def test_page_speaks_json(hal_command: Hal, bundle_with_page: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    report = hal_command("page", bundle_with_page, "-t", "engine", "-o", site, "--json").json
    assert (report["page"], report["target"]) == (str(site), "engine:c")
    assert report["files"]["model.wasm"] == (site / "model.wasm").stat().st_size
    assert report["bytes"] == sum(report["files"].values())


def test_a_page_that_cannot_be_is_told_in_two_lines(
    hal_command: Hal, bundle: Path, tmp_path: Path
) -> None:
    result = hal_command("page", bundle, "-o", tmp_path / "site", "--json")
    assert result.code == 2
    assert result.err.startswith("error: what the backend 'onnxruntime' builds does not run in a")
    assert len(result.err.strip().splitlines()) == 2
    assert not (tmp_path / "site").exists()
