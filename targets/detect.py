"""The machine that hal runs on, as a descriptor table: the target ``host``.

Only facts that stay the same from run to run are taken, so that the descriptor's digest (and
with it the compile cache) is stable. Bandwidth and clock are left unknown: they must be measured.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hal.descriptor import Descriptor

HOST = "host"
_FALLBACK = "cpu"


@dataclasses.dataclass(frozen=True)
class Cache:
    """One cache as a core sees it."""

    level: str
    bytes: int
    line_bytes: int | None
    cores: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """What was found out about this machine."""

    architecture: str
    model: str
    cores: int
    features: frozenset[str]
    memory_bytes: int | None
    caches: tuple[Cache, ...] = ()


def detect(root: Path = Path("/")) -> Machine:
    """Look at this machine; ``root`` is where ``proc`` and ``sys`` are. Never raises."""
    cpuinfo = _cpuinfo(root)
    cpus = _usable_cpus()
    return Machine(
        architecture=platform.machine(),
        model=cpuinfo.get("model name", "").strip() or platform.processor() or platform.machine(),
        cores=_core_count(root, cpus),
        features=_features(cpuinfo),
        memory_bytes=_memory_bytes(root),
        caches=_caches(root, min(cpus, default=0)),
    )


def usable_cores() -> int:
    """Physical cores that this process may use: what a pool of busy threads should count.

    Affinity and the control group's quota limit it; threads that share a core count once.
    """
    return _core_count(Path("/"), _usable_cpus())


def host_table(candidates: Iterable[Descriptor], machine: Machine | None = None) -> dict[str, Any]:
    """The raw table of ``host``, extending the best match among ``candidates``.

    A candidate matches when its ``[match]`` names this architecture and only features that this
    machine has; the one that asks for most features wins.
    """
    machine = machine or detect()
    base = _best_match(candidates, machine)
    table: dict[str, Any] = {
        "schema": 1,
        "name": HOST,
        "kind": "cpu",
        "description": f"this machine: {machine.model}, {machine.cores} core(s)",
        "cores": machine.cores,
        "memory": _memory_tables(machine),
        "default_route": "onnxruntime",
    }
    if base is None:
        return table | _without_library()
    return table | {"extends": base.name, "features": sorted(_useful_features(base, machine))}


def _best_match(candidates: Iterable[Descriptor], machine: Machine) -> Descriptor | None:
    best, fallback, most = None, None, -1
    for candidate in candidates:
        if candidate.name == _FALLBACK:
            fallback = candidate
        match = candidate.match
        if match is None or candidate.kind != "cpu":
            continue
        here = not match.machine or machine.architecture in match.machine
        if here and machine.features.issuperset(match.features) and len(match.features) > most:
            best, most = candidate, len(match.features)
    return best or fallback


def _without_library() -> dict[str, Any]:
    """Routes for a machine that nothing in the library describes."""
    return {
        "routes": {
            "onnxruntime": {"providers": ["CPUExecutionProvider"]},
            "tvm": {"target": {"kind": "llvm"}},
        }
    }


def _useful_features(base: Descriptor, machine: Machine) -> set[str]:
    """Features of this machine that some instruction of the base asks for."""
    wanted = {feature for i in base.instructions for feature in i.requires}
    return wanted & machine.features


def _memory_tables(machine: Machine) -> list[dict[str, Any]]:
    def found(value: int, source: str) -> dict[str, Any]:
        return {"value": value, "unit": "B", "source": source, "confidence": "measured"}

    tables: list[dict[str, Any]] = []
    for cache in machine.caches:
        entry: dict[str, Any] = {
            "level": cache.level,
            "kind": "cache",
            "capacity": found(cache.bytes, "operating system, at detection"),
            "cores": cache.cores,
        }
        if cache.line_bytes:
            entry["line_bytes"] = cache.line_bytes
        tables.append(entry)
    main: dict[str, Any] = {"level": "dram", "kind": "main"}
    if machine.memory_bytes:
        main["capacity"] = found(machine.memory_bytes, "operating system, at detection")
    return [*tables, main]


# -- the operating system ---------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """Fields of the first processor in ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), value)
    return fields


def _features(cpuinfo: dict[str, str]) -> frozenset[str]:
    """Names of features: a list of words, or one word such as ``rv64imafdcv_zba_zbb``."""
    found = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    letters, *names = cpuinfo.get("isa", "").strip().split("_")
    return frozenset([*found, *letters[4:], *names])


def _usable_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _core_count(root: Path, cpus: set[int]) -> int:
    """Physical cores that this process may use, limited by the control group's quota."""
    cores = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        cores.add(_read(topology / "thread_siblings_list") or str(cpu))
    quota = _quota(root)
    return max(1, min(len(cores), round(quota) if quota else len(cores)))


def _quota(root: Path) -> float | None:
    """CPUs that the control group grants, or None for no limit."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(words) == 2:
        limit, period = _integer(words[0]), _integer(words[1])
    else:
        limit = _integer(_read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
        period = _integer(_read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us"))
    return limit / period if limit and period and limit > 0 else None


def _memory_bytes(root: Path) -> int | None:
    """Installed memory, or the control group's limit where that is smaller."""
    total = None
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            kibibytes = _integer(line.split()[1])
            total = kibibytes * 1024 if kibibytes else None
    limits = [
        _integer(_read(root / "sys/fs/cgroup/memory.max")),
        _integer(_read(root / "sys/fs/cgroup/memory/memory.limit_in_bytes")),
    ]
    figures = [figure for figure in (total, *limits) if figure]
    return min(figures, default=None)


def _caches(root: Path, cpu: int) -> tuple[Cache, ...]:
    """Data and unified caches of one processor, nearest first."""
    found = []
    for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
        kind, size = _read(index / "type"), _size(_read(index / "size"))
        level = _integer(_read(index / "level"))
        if kind == "Instruction" or not size or not level:
            continue
        name = f"l{level}d" if kind == "Data" else f"l{level}"
        shared = _count_cpus(_read(index / "shared_cpu_list"))
        found.append(Cache(name, size, _integer(_read(index / "coherency_line_size")), shared))
    return tuple(sorted(found, key=lambda cache: cache.level))


def _size(text: str) -> int | None:
    """``32K`` or ``8M`` in bytes."""
    factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
    number = _integer(text.rstrip("KMG"))
    return number * factor if number else None


def _count_cpus(text: str) -> int:
    """How many processors a list such as ``0-3,8`` names; at least 1."""
    count = 0
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        low, high = _integer(first), _integer(last or first)
        count += high - low + 1 if low is not None and high is not None else 0
    return max(1, count)
