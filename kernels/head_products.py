"""Products with a quantized matrix for each head, read where they are packed."""

from __future__ import annotations

import functools
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels.emitting import ATTRIBUTES, i64, remaining
from hal.kernels.quantized_layout import Dot, Layout
from hal.kernels.quantized_matmul import CHAINS, Product, accumulators, rows_per_block, whole_of


@functools.lru_cache(maxsize=64)
def head_products(
    layout: Layout, heads: int, registers: int = 16, dot: Dot | None = None
) -> tirx.PrimFunc:
    """``out[b, h] = x[b, h] @ w[h]ᵀ`` with prepared activations, for B sequences of M rows.

    Parameters: the packed matrices of all heads ``uint8 [heads * bytes]``; the activations as they
    were, ``float32 [B, heads, M, k]``, which tell B and M and are not read; what
    :func:`hal.kernels.prepare_activations.prepare` made of their ``B * heads * M`` rows, as
    :func:`hal.kernels.quantized_matmul.matmul` takes it; the result
    ``float32 [B * heads * M, padded_n]``. A task is a block of columns of one head: it reads that
    part of the matrix for the first rows, later ones find it in a cache.
    """
    most = rows_per_block(registers, layout.tiles)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("head_products")
        given = ["x", "scales", "sums"] if layout.integer else ["x", "sums"]
        names = ["w", "like", *given, "out"]
        handles = {name: T.arg(name, T.handle()) for name in names}
        T.func_attr(ATTRIBUTES)
        batch, m = tirx.Var("batch", "int64"), tirx.Var("m", "int64")
        rows = batch * i64(heads) * m
        shapes: dict[str, Any] = {
            "w": ((heads * layout.bytes,), "uint8"),
            "like": ((batch, heads, m, layout.k), "float32"),
            "x": ((rows, layout.padded_k), "int8" if layout.integer else "float32"),
            "scales": ((rows, layout.groups), "float32"),
            "sums": ((rows, layout.groups), "int32" if layout.integer else "float32"),
            "out": ((rows, layout.padded_n), "float32"),
        }
        order = ["like", *(n for n in names if n != "like")]  # it binds the extents
        buffers = {n: T.match_buffer(handles[n], shapes[n][0], shapes[n][1]) for n in order}
        with T.sblock("root"):
            T.reads([whole_of(buffers[n], shapes[n][0]) for n in names[:-1]])
            T.writes([whole_of(buffers["out"], shapes["out"][0])])
            with T.parallel(i64(heads * layout.blocks)) as task:
                head = T.Bind(tirx.floordiv(task, i64(layout.blocks)))
                block = T.Bind(tirx.floormod(task, i64(layout.blocks)))
                offset = T.Bind(head * i64(layout.bytes))
                sums = most * layout.tiles
                taken = accumulators(layout, max(CHAINS, sums), sums)
                tiles = [i64(tile) for tile in range(layout.tiles)]

                def emit(first: Any, height: int) -> None:
                    product = Product(
                        layout, dot, buffers, taken, block, tiles, height, offset=offset
                    )
                    product.rows(first)

                with T.serial(i64(0), batch) as b:
                    first = T.Bind((b * i64(heads) + head) * m)
                    whole = T.Bind(tirx.floordiv(m, i64(most)))
                    with T.serial(i64(0), whole) as i:
                        emit(first + i * i64(most), most)
                    done = T.Bind(first + whole * i64(most))
                    remaining(m, most, lambda before, height: emit(done + before, height))
    return builder.get()
