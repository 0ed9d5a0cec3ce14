"""Matrix kernels of the TVM route against what the machine's memory and units give, in one run.

    python benchmarks/kernels.py [--bits 4 8] [--threads N] [--repeats 30]

Contenders are interleaved; a row shows the median and the best. *read* is a loop that reads 256 MB
and adds, with the same threads; a product of one row can be no faster than that. ``GOP/s`` counts a
multiply-add as two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.kernels import matmul
from hal.kernels.emitting import ATTRIBUTES, i64
from hal.kernels.prepare_activations import prepare
from hal.kernels.quantized_layout import Layout, byte_dot
from hal.kernels.quantized_matmul import matmul as quantized
from hal.targets import resolve
from hal.targets.detect import usable_cores

SHAPES = ((960, 2560), (2560, 960), (960, 49152))
"""K and N: the layers of a 0.36 B model and its vocabulary."""

COLD_BYTES = 150e6
"""Copies of a matrix are made up to this size, so that none is in a cache when its turn comes."""


def read_kernel(words: int, tasks: int) -> Any:
    """``out[task, 16]``: sums over a share of ``x int32 [words]``."""
    share = words // tasks
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("read")
        handles = [T.arg(name, T.handle()) for name in ("x", "out")]
        T.func_attr(ATTRIBUTES)
        x = T.match_buffer(handles[0], (words,), "int32")
        out = T.match_buffer(handles[1], (tasks, 16), "int32")
        with T.sblock("root"):
            T.reads([x[0:words]])
            T.writes([out[0:tasks, 0:16]])
            with T.parallel(i64(tasks)) as task:
                sums = T.alloc_buffer((4,), "int32x16", scope="local")
                for j in range(4):
                    T.buffer_store(sums, tirx.Broadcast(tirx.const(0, "int32"), 16), [j])
                with T.serial(i64(0), i64(share // 64)) as i:
                    for j in range(4):
                        at = task * i64(share) + i * i64(64) + i64(16 * j)
                        T.buffer_store(sums, sums[j] + x[tirx.Ramp(at, i64(1), 16)], [j])
                total = sums[0] + sums[1] + sums[2] + sums[3]
                T.buffer_store(out, total, [task, tirx.Ramp(i64(0), i64(1), 16)])
    return builder.get()


class Bench:
    """Compiles for the host and times contenders in turn."""

    def __init__(self, threads: int, repeats: int) -> None:
        descriptor = resolve("host").descriptor
        self.target = tvm.target.Target(dict(descriptor.routes["tvm"].target))  # type: ignore[union-attr]
        self.lanes = max(4, descriptor.vector_lanes("float32"))
        self.registers = descriptor.vector.registers or 16
        self.dot = byte_dot(descriptor)
        self.threads, self.repeats = threads, repeats
        self.contenders: list[tuple[str, float, float, list[Callable[[], None]]]] = []
        tvm.get_global_func("runtime.config_threadpool")(1, threads)

    def compiled(self, kernel: Any) -> Any:
        module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
        return tvm.compile(module, target=self.target)["kernel"]

    def add(self, name: str, size: int, operations: float, calls: list[Callable[[], None]]) -> None:
        self.contenders.append((name, size, operations, calls))

    def read(self) -> None:
        words = 1 << 26
        run = self.compiled(read_kernel(words, self.threads))
        x = tvm.runtime.tensor(np.ones(words, np.int32))
        out = tvm.runtime.tensor(np.zeros((self.threads, 16), np.int32))
        self.add("read", words * 4, 0, [lambda: run(x, out)])

    def quantized(self, k: int, n: int, bits: int, rows: int, integer: bool) -> None:
        dot = self.dot if integer else None
        lanes = dot.lanes if dot else self.lanes
        signed = dot is not None and dot.signed
        layout = Layout(n, k, bits, 32, lanes, integer=dot is not None, signed=signed)
        run = self.compiled(quantized(layout, self.registers, dot))
        make = self.compiled(prepare(layout, 32 if integer else 0))
        kinds = [np.int8, np.float32, np.int32] if layout.integer else [np.float32, np.float32]
        widths = [layout.padded_k, *[layout.groups] * (len(kinds) - 1)]
        prepared = [
            tvm.runtime.tensor(np.zeros((rows, w), kind))
            for w, kind in zip(widths, kinds, strict=True)
        ]
        make(tvm.runtime.tensor(np.ones((rows, k), np.float32)), *prepared)
        data = np.zeros(layout.bytes, np.uint8)
        copies = [tvm.runtime.tensor(data) for _ in range(1 + int(COLD_BYTES // layout.bytes))]
        out = tvm.runtime.tensor(np.zeros((rows, layout.padded_n), np.float32))
        calls = [lambda w=w: run(w, *prepared, out) for w in copies]
        name = f"w{bits}a{8 if integer else 16} {k} x {n}, {rows} rows"
        self.add(name, layout.bytes, 2.0 * rows * n * k, calls)

    def floats(self, k: int, n: int, rows: int) -> None:
        run = self.compiled(matmul.row_major(k, n, self.lanes, self.registers, self.threads))
        data = np.ones((k, n), np.float32)
        copies = [tvm.runtime.tensor(data) for _ in range(1 + int(COLD_BYTES // data.nbytes))]
        x = tvm.runtime.tensor(np.ones((rows, k), np.float32))
        out = tvm.runtime.tensor(np.zeros((rows, n), np.float32))
        calls = [lambda w=w: run(x, w, out) for w in copies]
        self.add(f"float32 {k} x {n}, {rows} rows", data.nbytes, 2.0 * rows * n * k, calls)

    def run(self) -> None:
        times: list[list[float]] = [[] for _ in self.contenders]
        for turn in range(self.repeats + 1):
            for taken, (_, _, _, calls) in zip(times, self.contenders, strict=True):
                start = time.perf_counter()
                calls[turn % len(calls)]()
                if turn:
                    taken.append(time.perf_counter() - start)
        print("| kernel | GB/s median | best | GOP/s median | best |\n|---|---|---|---|---|")
        for taken, (name, size, operations, _) in zip(times, self.contenders, strict=True):
            middle, best = statistics.median(taken), min(taken)
            rates = [f"{q / t / 1e9:.1f}" for q in (size, operations) for t in (middle, best)]
            print(f"| {name} | " + " | ".join(rates) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 256])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    for rows in arguments.rows:
        bench = Bench(arguments.threads, arguments.repeats if rows < 64 else 5)
        bench.read()
        for k, n in SHAPES if rows < 64 else SHAPES[:2]:
            for bits in arguments.bits:
                bench.quantized(k, n, bits, rows, integer=True)
                bench.quantized(k, n, bits, rows, integer=False)
            bench.floats(k, n, rows)
        bench.run()


if __name__ == "__main__":
    main()
