"""A language model small enough to be compiled in each test that wants another build of it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import hal
from tests.models import save

DIMS = {"batch": 1, "sequence": 1, "past": 24}
PROMPT = [7, 3, 11, 200, 42, 9, 1, 77, 130]
NEW = 14

STATIC = """
schema = 1
name = "fixed"
extends = "cpu"
[behaviour]
dynamic_shapes = false
[routes.onnxruntime]
providers = ["CPUExecutionProvider"]
[routes.tvm]
target = { kind = "llvm" }
[routes.c]
backend = "aot"
target = { kind = "llvm" }
compile = ["cc", "-O1"]
"""


@functools.cache
def bundle(family: str = "gemma3") -> hal.Bundle:
    """A model with a layer that looks back at 8 positions and one that sees all of them."""
    with tempfile.TemporaryDirectory() as folder:
        return hal.compile(save(family, Path(folder)), target="host:onnxruntime")


@functools.cache
def expected(family: str = "gemma3") -> tuple[int, ...]:
    """What the host says, without any extent fixed."""
    with bundle(family).session() as session:
        return tuple(tokens(session))


def tokens(session: hal.Session, prompt: list[int] = PROMPT, new: int = NEW) -> list[int]:
    """Greedy tokens."""
    return list(session.generate(prompt, max_new_tokens=new, stop_token_ids=[]))


def fixed(folder: Path, route: str) -> str:
    """A target with static shapes, through a route of this machine."""
    file = folder / "fixed.toml"
    file.write_text(STATIC)
    return f"{file}:{route}"
