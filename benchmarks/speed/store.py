"""Results on disk: written after every cell, so that a run can be stopped and gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speed.cells import Group, Measure


class Store:
    """One JSON file. ``cells`` by name, each with its rows; other facts beside them."""

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        self.data: dict[str, Any] = {"cells": {}}
        if path.exists():
            self.data = json.loads(path.read_text())
        self._fresh: set[str] = set()
        self._resume = resume

    def done(self, cell: str) -> bool:
        """Whether a cell need not be measured: it was in this run, or in one that is resumed."""
        return cell in self._fresh or (self._resume and cell in self.data["cells"])

    def put(self, group: Group, measure: Measure, rows: list[dict[str, Any]]) -> None:
        """Store a complete cell."""
        cell = group.cell(measure)
        self._fresh.add(cell)
        self.data["cells"][cell] = {
            "group": group.title, "title": measure.title, "unit": measure.unit,
            "higher_is_better": measure.higher_is_better, "facts": dict(group.facts),
            "rows": rows, "measured": self.data.get("machine", {}).get("date"),
        }  # fmt: skip
        self.write()

    def has(self, name: str) -> bool:
        """Whether a fact need not be found again, as :meth:`done`."""
        return name in self._fresh or (self._resume and name in self.data)

    def done_profile(self, group: str, contender: str) -> bool:
        """Whether a run that is resumed has a profile already."""
        return self._resume and contender in self.data.get("profiles", {}).get(group, {})

    def fact(self, name: str, value: Mapping[str, Any]) -> None:
        """Store something that is no cell; the machine of earlier cells is kept."""
        before = self.data.get(name)
        if name == "machine" and before:
            self.data.setdefault("earlier", {})[before["date"]] = before
        self._fresh.add(name)
        self.data[name] = value
        self.write()

    def write(self) -> None:
        """Write the file; a reader sees the old one or the new one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        waiting = self._path.with_suffix(".tmp")
        waiting.write_text(json.dumps(self.data, indent=1) + "\n")
        waiting.replace(self._path)
