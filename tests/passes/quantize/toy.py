"""A small model with one layer of each kind."""

from __future__ import annotations

import numpy as np

from hal.ir import Graph
from tests.passes.toys import Toy


def language_model(width: int = 64, vocabulary: int = 96, *, tied: bool = False) -> Graph:
    """Embedding, a linear layer in each orientation, a router that stays, and a head."""
    toy = Toy()
    ids = toy.add_input("ids", ["batch", "sequence"], "INT64")
    table = toy.weight(vocabulary, width)
    table.name = "table"
    x = toy("Gather", table, ids)
    first = toy.weight(width, 128)
    first.name = "first.weight"
    hidden = toy("MatMul", x, first)
    second = toy.weight(width, 128)
    second.name = "second.weight"
    hidden = toy("MatMul", toy("Relu", hidden), toy("Transpose", second, perm=[1, 0]))
    router = toy.weight(width, 80)
    router.name = "router.weight"
    chosen = toy("TopK", toy("Softmax", toy("MatMul", hidden, router)), np.array([3]), outputs=2)
    scaled = toy("Mul", hidden, toy("ReduceSum", chosen[0], np.array([-1])))
    head = table if tied else toy.weight(vocabulary, width)
    head.name = "table" if tied else "head.weight"
    toy.output(toy("MatMul", scaled, toy("Transpose", head, perm=[1, 0])), "logits")
    return toy.graph()
