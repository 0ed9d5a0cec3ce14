"""The table of targets: its pages say what the results say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest


def _script() -> Any:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "targets.py"
    spec = importlib.util.spec_from_file_location("table_of_targets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


targets = _script()
ROWS = json.loads((targets.ROOT / "benchmarks" / "results" / "targets.json").read_text())


def test_readme_and_docs_have_the_table_of_the_results() -> None:
    for path in ("README.md", "docs/targets.md"):
        assert targets.table(ROWS["rows"]) in (targets.ROOT / path).read_text(), path


def test_the_table_of_a_page_is_exchanged_and_nothing_else() -> None:
    text = f"before\n{targets.MARKS[0]}\nold\n{targets.MARKS[1]}\nafter\n"
    made = targets.with_table(text, ROWS["rows"])
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert "old" not in made
    assert targets.with_table(made, ROWS["rows"]) == made
    with pytest.raises(SystemExit, match="README"):
        targets.with_table("no marks", ROWS["rows"])
