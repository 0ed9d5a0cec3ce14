"""Products of tokens with the quantized weights of the experts that each of them chose."""

from __future__ import annotations

import functools

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.emitting import ATTRIBUTES, i64
from hal.kernels.quantized_layout import Dot, Layout
from hal.kernels.quantized_matmul import CHAINS, Product, accumulators, whole_of
from hal.kernels.vectors import span, spread


@functools.lru_cache(maxsize=64)
def expert_products(
    layout: Layout, experts: int, choices: int, *, shared: bool, dot: Dot | None = None
) -> tirx.PrimFunc:
    """``out[t * choices + k] = w[index[t, k]] @ x[row]ᵀ`` for choice ``k`` of token ``t``.

    ``row`` is the token if ``shared``, and ``x`` has ``T`` rows; else it is the choice.
    Parameters: the packed matrices of all experts ``uint8 [experts * bytes]``, ``index`` int64
    ``[T, choices]``, what :func:`hal.kernels.prepare_activations.prepare` made of the rows, as
    :func:`hal.kernels.quantized_matmul.matmul` takes it, the result
    ``float32 [T * choices, padded_n]``.
    A block of columns walks over experts, then choices, so it reads those that are chosen, each
    once for all tokens. Rows of an index out of range are zero.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("expert_products")
        given = ["x", "scales", "sums"] if layout.integer else ["x", "sums"]
        names = ["w", "index", *given, "out"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        T.func_attr(ATTRIBUTES)
        tokens = tirx.Var("tokens", "int64")
        all_choices = tokens * i64(choices)
        rows = tokens if shared else all_choices
        shapes = {
            "w": ((experts * layout.bytes,), "uint8"),
            "index": ((tokens, choices), "int64"),
            "x": ((rows, layout.padded_k), "int8" if layout.integer else "float32"),
            "scales": ((rows, layout.groups), "float32"),
            "sums": ((rows, layout.groups), "int32" if layout.integer else "float32"),
            "out": ((all_choices, layout.padded_n), "float32"),
        }
        order = ["index", *(n for n in names if n != "index")]  # it binds the number of tokens
        buffers = {n: T.match_buffer(handles[n], shapes[n][0], shapes[n][1]) for n in order}
        with T.sblock("root"):
            T.reads([whole_of(buffers[n], shapes[n][0]) for n in names[:-1]])
            T.writes([whole_of(buffers["out"], shapes["out"][0])])
            with T.parallel(i64(layout.blocks)) as block:
                registers = accumulators(layout, max(CHAINS, layout.tiles), layout.tiles)
                tiles = [i64(tile) for tile in range(layout.tiles)]
                product = Product(layout, dot, buffers, registers, block, tiles, 1)
                _walk_experts(product, experts, choices, shared=shared)
    return builder.get()


def _walk_experts(product: Product, experts: int, choices: int, *, shared: bool) -> None:
    """One block of columns of all experts that were chosen."""
    layout, buffers = product.layout, product.buffers
    tokens = buffers["index"].ty.shape[0]
    zeros = spread(tirx.const(0.0, "float32"), layout.lanes)
    with T.serial(i64(0), tokens * i64(choices)) as cleared:
        for tile in product.tiles:
            column = product.block * i64(layout.columns) + tile * i64(layout.lanes)
            T.buffer_store(buffers["out"], zeros, [cleared, span(column, layout.lanes)])
    with (
        T.serial(i64(0), i64(experts)) as expert,
        T.serial(i64(0), tokens) as token,
        T.serial(i64(0), i64(choices)) as choice,
    ):
        chosen = buffers["index"][token, choice] == expert
        with T.If(chosen), T.Then():
            row = T.Bind(token * i64(choices) + choice)
            product.offset = T.Bind(expert * i64(layout.bytes))
            product.rows(token if shared else row, row)
