"""The text that the reference model learns: documentation that comes with Python packages.

Python's documentation topics, and the docstrings of the standard library and of packages that hal
depends on, so there is something to read wherever hal can train. A *document* is one module: its
functions and classes with their signatures and docstrings.
"""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from demo_text import END_OF_TEXT_ID, paragraphs
from rich.progress import track
from tokenizers import Tokenizer

PACKAGES = ("numpy", "networkx", "torch", "onnx", "onnxscript", "pydantic", "rich", "tokenizers")

HELD_OUT_ONE_IN = 40
"""One document in so many is held out, chosen by a checksum of its name."""

_SHORTEST = 400
"""Documents of fewer characters are left out."""


@dataclass(frozen=True)
class Documents:
    """Name to text. No document, and no long paragraph, is in both."""

    train: dict[str, str]
    held_out: dict[str, str]


def load_documents() -> Documents:
    """Read all documents and set the held-out ones apart.

    A paragraph of the held-out text is taken out of the training text wherever it is repeated
    there; one that several training documents share is kept in the first.
    """
    texts = {f"topics/{name}": text.strip() + "\n" for name, text in topics.items()}
    for name, path in track(list(_modules()), description="reading docstrings"):
        text = documented(path)
        if len(text) >= _SHORTEST:
            texts[name] = text
    held_out = {name: text for name, text in sorted(texts.items()) if is_held_out(name)}
    seen = {own for text in held_out.values() for own in paragraphs(text)}
    train = {}
    for name, text in sorted(texts.items()):
        if name not in held_out:
            kept = without_repeated(text, seen)
            if len(kept) >= _SHORTEST:
                train[name] = kept
    return Documents(train, held_out)


def is_held_out(name: str) -> bool:
    """Whether the document `name` is never trained on; the same wherever it is asked."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


def without_repeated(text: str, seen: set[str]) -> str:
    """`text` without the long paragraphs that are in `seen`; those that stay are added to it."""
    own = paragraphs(text)
    for paragraph in own:
        if paragraph in seen:
            text = text.replace(paragraph, "")
    seen.update(own)
    return text.strip() + "\n"


def documented(path: Path) -> str:
    """Signatures and docstrings of a Python file, in order; empty if it cannot be parsed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "m.py"
    ...     _ = path.write_text('def double(x: int) -> int:\\n    "Twice x."\\n    return 2 * x')
    ...     print(documented(path))
    double(x: int)
        Twice x.
    <BLANKLINE>
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) > 2 * len(docstring.encode()) // 3:  # mostly ASCII
            parts.append(_entry(node, docstring))
    return "\n\n".join(parts) + "\n" if parts else ""


def _entry(node: ast.Module | ast.ClassDef | ast.FunctionDef, docstring: str) -> str:
    if isinstance(node, ast.Module):
        return docstring
    head = f"class {node.name}"
    if isinstance(node, ast.FunctionDef):
        head = f"{node.name}({ast.unparse(node.args)})"
    lines = (f"    {line}" if line else "" for line in docstring.splitlines())
    return "\n".join([head, *lines])


def _modules() -> Iterator[tuple[str, Path]]:
    """Python files with names that do not depend on where they are installed."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not {"site-packages", "test", "tests", "pydoc_data"} & set(name.parts):
            yield f"python/{name.as_posix()}", path
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or []) if found else []:
            for path in sorted(Path(folder).rglob("*.py")):
                yield f"{package}/{path.relative_to(folder).as_posix()}", path


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """One stream of token ids, int32; each text begins with the end-of-text token."""
    stream: list[int] = []
    for text in texts:
        stream += [END_OF_TEXT_ID, *tokenizer.encode(text).ids]
    return np.array(stream, np.int32)


def batch(stream: np.ndarray, step: int, rows: int, window: int, seed: int) -> np.ndarray:
    """Windows of a step, `[rows, window]`: a function of its arguments, so a run can go on.

    Each pass over the stream cuts it at another offset and takes the windows in another order.
    """
    count = (len(stream) - window) // window
    picked = []
    for index in range(step * rows, (step + 1) * rows):
        turn, place = divmod(index, count)
        random = np.random.default_rng([seed, turn])
        start = int(random.integers(window)) + window * int(random.permutation(count)[place])
        picked.append(stream[start : start + window])
    return np.stack(picked).astype(np.int64)
