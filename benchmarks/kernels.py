"""Matrix kernels of the TVM route against their rooflines, for vectors of two widths.

    python benchmarks/kernels.py [--threads N] [--formats w4a8 float32] [--json FILE]

The roofline of a product is the smaller of what the memory delivers, times the operations for each
byte that has to cross the bus, and what the arithmetic units give; both are measured by the loops
of ``machine.py``, in turns with the kernels, so that a busy neighbour slows all. A share is that
roofline's time over the kernel's, medians of several turns. Products of few rows read another copy
of their matrix in each call, as a model's steps do, so none is in a cache. ``ternary`` codes are
stored in two bits, and have the kernels of ``w2a8``.

Bytes are those of the packed weights, of the prepared activations and of the result; a multiply-add
is two operations. With one thread the clock is that of the thread, so what others take of the core
does not count. Preparing activations is a kernel of its own and not counted here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import tvm
from rich.console import Console
from rich.table import Table

from hal.kernels import matmul
from hal.kernels.prepare_activations import prepare
from hal.kernels.quantized_layout import Layout
from hal.kernels.quantized_matmul import matmul as quantized
from hal.targets import resolve
from hal.targets.detect import usable_cores
from hal.targets.tvm.program import use_threads
from hal.targets.tvm.weights import shared_tensor

SIZES = (896, 960, 2560, 4864)
"""K and N: widths of models from 0.36 B to 0.5 B parameters and of their feed-forward layers."""

ROWS = (1, 4, 8, 64, 256)

GROUP = 32
"""Codes that share a scale."""

COLD_BYTES = 160 << 20
"""Copies of a matrix fill this much memory: several times the largest cache."""

SLICE = 2e-3
"""Seconds of a turn that a product gets at least."""


@dataclasses.dataclass(frozen=True)
class Form:
    """Weights of some bits for activations that are rounded to bytes or not; 32: plain floats."""

    bits: int
    rounded: bool = False

    @property
    def name(self) -> str:
        """As recipes say it."""
        return "float32" if self.bits == 32 else f"w{self.bits}a{8 if self.rounded else 16}"


FORMS = {
    form.name: form for form in (*(Form(b, True) for b in (8, 4, 3, 2)), Form(8), Form(4), Form(32))
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A compiled product of some rows; ``calls`` go over copies of its matrix."""

    rows: int
    bytes: float
    operations: float
    calls: Iterator[Callable[[], None]]

    def seconds(self, at_least: float, now: Callable[[], float]) -> float:
        """Mean seconds of a call, over as many as fill the time."""
        count, start = 0, now()
        while True:
            next(self.calls)()
            count += 1
            taken = now() - start
            if taken >= at_least:
                return taken / count


@dataclasses.dataclass(frozen=True)
class Result:
    """What a product reached. Rates are per second, ``share`` is of its roofline."""

    form: str
    bits: int
    k: int
    n: int
    rows: int
    seconds: float
    bytes: float
    operations: float
    read: float
    peak: float

    @property
    def bound(self) -> str:
        """What limits it: ``memory`` or ``arithmetic``."""
        return "memory" if self.bytes / self.read > self.operations / self.peak else "arithmetic"

    @property
    def share(self) -> float:
        """Time that the roofline allows over the time it took."""
        return max(self.bytes / self.read, self.operations / self.peak) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self) | {"bound": self.bound, "share": self.share}


class Bench:
    """Compiles products for vectors of one width and times them beside the machine's loops."""

    def __init__(self, bits: int, threads: int, turns: int, memory: np.ndarray) -> None:
        self.units, self.threads, self.turns = machine.units(bits), threads, turns
        self.memory = memory
        self.read = machine.reading(threads)
        self.fused = machine.multiplying(threads, bits)
        self.dotted = machine.dotting(threads, bits)

    def copies(self, size: int, kind: str, shape: tuple[int, ...]) -> list[Any]:
        """As many matrices as the memory holds, each at a multiple of a page."""
        step = -(-size // 4096) * 4096
        places = range(0, max(len(self.memory) - size, 0) + 1, step)
        return [shared_tensor(self.memory[at : at + size], kind, shape) for at in places]

    def products(self, form: Form, k: int, n: int, rows: list[int]) -> list[Product]:
        """The product of that shape for each number of rows."""
        make = self._float if form.bits == 32 else self._quantized
        return make(form, k, n, rows)

    def _quantized(self, form: Form, k: int, n: int, rows: list[int]) -> list[Product]:
        dot = self.units.dot if form.rounded else None
        lanes = self.units.lanes
        signed = dot is not None and dot.signed
        layout = Layout(n, k, form.bits, GROUP, lanes, integer=dot is not None, signed=signed)
        run = machine.compiled(quantized(layout, self.units.registers, dot), self.units.target)
        make = machine.compiled(prepare(layout, GROUP if form.rounded else 0), self.units.target)
        copies = self.copies(layout.bytes, "uint8", (layout.bytes,))
        kinds = [np.int8, np.float32, np.int32] if layout.integer else [np.float32, np.float32]
        widths = [layout.padded_k, *[layout.groups] * (len(kinds) - 1)]
        found = []
        for m in rows:
            x = tvm.runtime.tensor(np.random.default_rng(m).random((m, k), np.float32))
            prepared = [
                tvm.runtime.tensor(np.zeros((m, w), kind))
                for w, kind in zip(widths, kinds, strict=True)
            ]
            make(x, *prepared)
            out = tvm.runtime.tensor(np.zeros((m, layout.padded_n), np.float32))
            calls = [lambda w=w, p=prepared, o=out: run(w, *p, o) for w in copies]
            moved = layout.bytes + sum(p.numpy().nbytes for p in prepared) + out.numpy().nbytes
            found.append(Product(m, moved, 2.0 * m * n * k, itertools.cycle(calls)))
        return found

    def _float(self, form: Form, k: int, n: int, rows: list[int]) -> list[Product]:
        units = self.units
        kernel = matmul.row_major(k, n, units.lanes, units.registers, self.threads)
        run = machine.compiled(kernel, units.target)
        copies = self.copies(4 * k * n, "float32", (k, n))
        found = []
        for m in rows:
            x = tvm.runtime.tensor(np.random.default_rng(m).random((m, k), np.float32))
            out = tvm.runtime.tensor(np.zeros((m, n), np.float32))
            calls = [lambda w=w, x=x, o=out: run(x, w, o) for w in copies]
            moved = 4.0 * (k * n + m * k + m * n)
            found.append(Product(m, moved, 2.0 * m * n * k, itertools.cycle(calls)))
        return found

    def measure(self, form: Form, k: int, n: int, rows: list[int]) -> list[Result]:
        """The products of one matrix, in turns with the loops."""
        products = self.products(form, k, n, rows)
        unit = self.dotted if form.rounded and self.dotted else self.fused
        use_threads(self.threads)
        taken: dict[Any, list[float]] = defaultdict(list)
        now = machine.clock(self.threads)
        for turn in range(self.turns + 1):
            row: list[tuple[Any, float]] = [
                (loop, machine.timed([loop.call], self.threads)[0]) for loop in (self.read, unit)
            ]
            row += [(p.rows, p.seconds(SLICE, now)) for p in products]
            if turn:
                for name, seconds in row:
                    taken[name].append(seconds)
        middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
        read, peak = self.read.amount / middle[self.read], unit.amount / middle[unit]
        return [
            Result(form.name, self.units.bits, k, n, p.rows, middle[p.rows], p.bytes,
                   p.operations, read, peak)
            for p in products
        ]  # fmt: skip


def template(result: Result) -> str:
    """The code that a product runs: kernels have other loops for few rows than for many."""
    kind = "float" if result.form == "float32" else "quantized"
    if result.rows == 1:
        return f"{kind}, one row"
    return f"{kind}, {'2 to 8' if result.rows <= 8 else 'many'} rows"


def summary(title: str, results: list[Result], key: Callable[[Result], str]) -> Table:
    """Median and worst share for each ``key`` and width."""
    table = Table(title=title)
    for column in ("", "bits", "products", "median %", "worst %", "bound by memory"):
        table.add_column(column, justify="left" if not column else "right")
    groups: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result), result.bits].append(result)
    for (name, bits), group in groups.items():
        shares = [100 * r.share for r in group]
        bound = sum(r.bound == "memory" for r in group)
        figures = [f"{statistics.median(shares):.0f}", f"{min(shares):.0f}", str(bound)]
        table.add_row(name, str(bits), str(len(group)), *figures)
    return table


def main() -> None:
    """Measure, print the tables, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="K and N")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--bits", type=int, nargs="+", default=machine.widths())
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where all figures go")
    arguments = parser.parse_args()
    console = Console(width=110)
    memory = machine.area(COLD_BYTES)
    memory[:] = 0
    results: list[Result] = []
    for bits, name in itertools.product(arguments.bits, arguments.formats):
        bench = Bench(bits, arguments.threads, arguments.turns, memory)
        for k, n in itertools.product(arguments.sizes, arguments.sizes):
            results += bench.measure(FORMS[name], k, n, arguments.rows)
        mine = [r for r in results if (r.bits, r.form) == (bits, name)]
        console.print(f"{name}, {bits} bits: median {_median(mine):.0f} %", highlight=False)
    console.print(summary("Templates", results, template))
    console.print(summary("Formats", results, lambda r: f"{r.form}, {r.rows} rows"))
    read, peaks = statistics.median(r.read for r in results), _peaks(results)
    console.print(f"read {read / 1e9:.1f} GB/s; peaks " + ", ".join(
        f"{kind} at {bits} bits {rate / 1e9:.0f} GOP/s" for (kind, bits), rate in peaks.items()
    ), highlight=False)  # fmt: skip
    if arguments.json:
        facts = {"machine": resolve("host").descriptor.description, "threads": arguments.threads}
        rows = [r.to_dict() for r in results]
        arguments.json.write_text(json.dumps(facts | {"products": rows}, indent=1) + "\n")


def _median(results: list[Result]) -> float:
    return statistics.median(100 * r.share for r in results)


def _peaks(results: list[Result]) -> dict[tuple[str, int], float]:
    """Median of the arithmetic rates by kind and width."""
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    for r in results:
        rates["bytes" if r.form.endswith("a8") else "floats", r.bits].append(r.peak)
    return {key: statistics.median(found) for key, found in rates.items()}


if __name__ == "__main__":
    main()
