"""What this machine's memory and arithmetic units give: the ceilings that kernels are held against.

    python benchmarks/machine.py [--threads N] [--repeats 9]

Each figure is the median of several passes of a loop that does nothing else, compiled for the
machine like the kernels are. So it is a rate that a program reaches, and not one from a data sheet.
With one thread the clock is that of the thread, and others on the same core do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import mmap
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T  # noqa: N812

from hal.descriptor import Descriptor
from hal.kernels.emitting import ATTRIBUTES, i64, vector
from hal.kernels.quantized_layout import Dot
from hal.targets import resolve
from hal.targets.detect import usable_cores
from hal.targets.tvm.program import use_threads
from hal.targets.tvm.target import tvm_target
from hal.targets.tvm.weights import shared_tensor

READ_BYTES = 1 << 28
"""What one pass reads: several times the largest cache."""

REPEATS = 9
"""Passes that the median is taken of."""

STREAMS = 2
"""Places of its share that a thread reads in turn; of 1, 2, 4 and 8 it was the fastest here."""

STEPS = 200_000
"""Rounds of a pass over the accumulators."""

CHAINS = 12
"""Accumulators of a round: more than units times latency, and no more than 16 registers hold."""


@dataclasses.dataclass(frozen=True)
class Units:
    """The arithmetic of this machine in vectors of some width.

    Attributes:
        bits: width of a vector.
        lanes: float32 numbers in a vector.
        registers: vector registers.
        dot: the dot product of bytes with a result of this width, or None.
        target: of TVM, as a dictionary.
    """

    bits: int
    lanes: int
    registers: int
    dot: Dot | None
    target: dict[str, Any]


def units(bits: int, descriptor: Descriptor | None = None) -> Units:
    """What the machine (or ``descriptor``) offers in vectors of ``bits``.

    Raises:
        ValueError: its vectors are narrower.
    """
    found = descriptor or resolve("host").descriptor
    if bits > found.vector.bits:
        raise ValueError(f"vectors of {found.name} have {found.vector.bits} bits, not {bits}")
    target = tvm_target(found) | {"vector-width": bits}
    lanes = max(1, bits // 32)
    dots = [
        Dot(i.llvm, i.lanes, i.k, signed=i.types[1] == i.types[0])
        for i in found.offered()
        if i.llvm and i.does == "dot" and i.lanes == lanes and i.k == 4 and i.types[2] == "i32"
    ]
    return Units(bits, lanes, found.vector.registers or 16, next(iter(dots), None), target)


def widths(descriptor: Descriptor | None = None) -> list[int]:
    """Widths of vectors in bits that kernels are measured with: the widest one and half of it."""
    widest = (descriptor or resolve("host").descriptor).vector.bits
    return [bits for bits in (widest // 2, widest) if bits >= 128]


def compiled(kernel: Any, target: dict[str, Any]) -> Any:
    """A primitive function as a function of tensors."""
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=tvm.target.Target(dict(target)))["kernel"]


def area(size: int) -> np.ndarray:
    """``size`` bytes of memory that starts a large page, in such pages where the system has them.

    With pages of 4 KiB reading is slower, and how much depends on what ran before. The memory lasts
    as long as the program.
    """
    page = 1 << 21
    # Memory that is shared, which is what mmap gives by itself, has large pages seldom.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, -(-max(size, 1) // page) * page + page, **flags)
    with contextlib.suppress(AttributeError, OSError):  # not everywhere
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % page
    _AREAS.append(memory)
    return whole[start : start + size]


_AREAS: list[mmap.mmap] = []


def resident(data: np.ndarray) -> tvm.runtime.Tensor:
    """A copy of ``data`` in an :func:`area` of its own."""
    raw = area(data.nbytes)
    raw[:] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return shared_tensor(raw, data.dtype.name, data.shape)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop that does one thing: a call is one pass, in which it does ``amount`` of it.

    Passes outside of :meth:`rate` run on as many threads as ``use_threads`` was last told.
    """

    amount: float
    call: Callable[[], None]
    threads: int

    def rate(self, repeats: int = REPEATS) -> float:
        """The median over ``repeats`` passes of the amount per second; one more comes before."""
        use_threads(self.threads)
        taken = timed((self.call for _ in range(repeats + 1)), self.threads)
        return self.amount / statistics.median(taken[1:])


def clock(threads: int) -> Callable[[], float]:
    """Seconds by the clock that fits: with one thread, only those that the thread ran.

    So others on the same cores do not count. Threads of a pool also run while they wait; for
    several, time is that of the wall.
    """
    return time.thread_time if threads == 1 else time.perf_counter


def timed(calls: Iterable[Callable[[], None]], threads: int = 2) -> list[float]:
    """Seconds of each call, by :func:`clock`."""
    taken, now = [], clock(threads)
    for call in calls:
        start = now()
        call()
        taken.append(now() - start)
    return taken


# -- reading --------------------------------------------------------------------------------------


def read_bandwidth(threads: int, repeats: int = REPEATS) -> float:
    """Bytes per second that ``threads`` threads together read from memory, nothing written."""
    return reading(threads).rate(repeats)


@functools.lru_cache(maxsize=8)
def reading(threads: int) -> Loop:
    """Reads ``READ_BYTES`` bytes, which are in no cache when their turn comes."""
    found = units(max(128, resolve("host").descriptor.vector.bits))
    words = READ_BYTES // 4
    run = compiled(_read_kernel(words, threads, found.lanes), found.target)
    x = resident(np.ones(words, np.int32))
    out = tvm.runtime.tensor(np.zeros((threads, found.lanes), np.int32))

    def call() -> None:
        run(x, out)

    return Loop(
        float(_run(words, threads, found.lanes) * threads * STREAMS * 8 * found.lanes),
        call,
        threads,
    )


def _run(words: int, tasks: int, lanes: int) -> int:
    """Pairs of vectors in a stream."""
    return words // (tasks * STREAMS * 2 * lanes)


def _read_kernel(words: int, tasks: int, lanes: int) -> Any:
    """``out[task, lanes]``: sums over shares of ``x int32 [words]``."""
    run = _run(words, tasks, lanes)
    share, kind = run * STREAMS * 2 * lanes, vector("int32", lanes)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("read")
        handles = [T.arg(name, T.handle()) for name in ("x", "out")]
        T.func_attr(ATTRIBUTES)
        x = T.match_buffer(handles[0], (words,), "int32")
        out = T.match_buffer(handles[1], (tasks, lanes), "int32")
        with T.sblock("root"):
            T.reads([x[0:words]])
            T.writes([out[0:tasks, 0:lanes]])
            with T.parallel(i64(tasks)) as task:
                sums = T.alloc_buffer((2 * STREAMS,), kind, scope="local")
                for j in range(2 * STREAMS):
                    T.buffer_store(sums, tirx.Broadcast(tirx.const(0, "int32"), lanes), [j])
                with T.serial(i64(0), i64(run)) as i:
                    for j in range(2 * STREAMS):
                        stream, half = divmod(j, 2)
                        at = task * i64(share) + i64(stream * run * 2 * lanes)
                        at = at + i * i64(2 * lanes) + i64(half * lanes)
                        T.buffer_store(sums, sums[j] + x[tirx.Ramp(at, i64(1), lanes)], [j])
                total = sums[0]
                for j in range(1, 2 * STREAMS):
                    total = total + sums[j]
                T.buffer_store(out, total, [task, tirx.Ramp(i64(0), i64(1), lanes)])
    return builder.get()


# -- arithmetic -----------------------------------------------------------------------------------


def peak_fma(threads: int, bits: int, repeats: int = REPEATS) -> float:
    """Operations per second of float32 multiply-adds in vectors of ``bits``; each counts as two.

    Raises:
        ValueError: the machine's vectors are narrower.
    """
    return multiplying(threads, bits).rate(repeats)


def peak_dot(threads: int, bits: int, repeats: int = REPEATS) -> float | None:
    """Operations per second of dot products of bytes with results of ``bits``, or None without one.

    A product and its addition count as two.

    Raises:
        ValueError: the machine's vectors are narrower.
    """
    loop = dotting(threads, bits)
    return None if loop is None else loop.rate(repeats)


@functools.lru_cache(maxsize=8)
def multiplying(threads: int, bits: int) -> Loop:
    """Float32 multiply-adds on registers."""
    found = units(bits)
    kind = vector("float32", found.lanes)
    return _arithmetic(threads, found, f"llvm.fma.v{found.lanes}f32", kind, kind, 2)


@functools.lru_cache(maxsize=8)
def dotting(threads: int, bits: int) -> Loop | None:
    """Dot products of four bytes on registers."""
    found = units(bits)
    if found.dot is None:
        return None
    kinds = vector("int8", 4 * found.lanes), vector("int32", found.lanes)
    return _arithmetic(threads, found, found.dot.llvm, *kinds, 8)


def _arithmetic(
    threads: int, found: Units, llvm: str, operand: str, result: str, operations: int
) -> Loop:
    run = compiled(_arithmetic_kernel(threads, llvm, operand, result, found.lanes), found.target)
    x = tvm.runtime.tensor(np.ones((2, 4 * found.lanes), operand.split("x")[0]))
    out = tvm.runtime.tensor(np.zeros((threads, found.lanes), result.split("x")[0]))

    def call() -> None:
        run(x, out)

    return Loop(float(threads) * STEPS * CHAINS * found.lanes * operations, call, threads)


def _arithmetic_kernel(tasks: int, llvm: str, operand: str, result: str, lanes: int) -> Any:
    """``out[task] = sum of CHAINS accumulators``, each ``STEPS`` times an instruction on ``x``."""
    element, kind = operand.split("x")[0], result.split("x")[0]
    width = int(operand.split("x")[1])
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("arithmetic")
        handles = [T.arg(name, T.handle()) for name in ("x", "out")]
        T.func_attr(ATTRIBUTES)
        x = T.match_buffer(handles[0], (2, 4 * lanes), element)
        out = T.match_buffer(handles[1], (tasks, lanes), kind)
        with T.sblock("root"):
            T.reads([x[0:2, 0 : 4 * lanes]])
            T.writes([out[0:tasks, 0:lanes]])
            with T.parallel(i64(tasks)) as task:
                sums = T.alloc_buffer((CHAINS,), result, scope="local")
                for j in range(CHAINS):
                    start = tirx.Broadcast(tirx.const(j, kind), lanes)
                    T.buffer_store(sums, start, [j])
                a, b = (T.Bind(x[row, tirx.Ramp(i64(0), i64(1), width)]) for row in range(2))
                with T.serial(i64(0), i64(STEPS)):
                    for j in range(CHAINS):
                        operands = (a, b, sums[j]) if element == kind else (sums[j], a, b)
                        done = tirx.call_llvm_pure_intrin(result, llvm, *operands)
                        T.buffer_store(sums, done, [j])
                total = sums[0]
                for j in range(1, CHAINS):
                    total = total + sums[j]
                T.buffer_store(out, total, [task, tirx.Ramp(i64(0), i64(1), lanes)])
    return builder.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    threads, repeats = arguments.threads, arguments.repeats
    print(f"{threads} thread(s), medians of {repeats} passes")
    print(f"read: {read_bandwidth(threads, repeats) / 1e9:.1f} GB/s")
    for bits in widths():
        fma = peak_fma(threads, bits, repeats)
        print(f"float32 multiply-add, {bits} bits: {fma / 1e9:.0f} GFLOP/s")
        dot = peak_dot(threads, bits, repeats)
        told = "none" if dot is None else f"{dot / 1e9:.0f} GOP/s"
        print(f"dot product of bytes, {bits} bits: {told}")


if __name__ == "__main__":
    main()
