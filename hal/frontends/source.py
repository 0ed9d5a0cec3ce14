"""What a frontend hands to the compiler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hal.ir import Graph


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A graph, the files that belong with it (tokenizer, templates) and where it came from.

    ``assets`` maps names in a bundle to files on disk; ``source`` is a text for manifests.
    """

    graph: Graph
    assets: dict[str, Path] = dataclasses.field(default_factory=dict)
    source: str = ""
