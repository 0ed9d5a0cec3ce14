"""What the benchmark ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

_TOLD = ("avx", "fma", "amx", "sve", "asimd", "dotprod", "i8mm", "bf16", "f16c", "rvv")


def facts(threads: int) -> dict[str, Any]:
    """Processor, cores, memory and the flags that matter for arithmetic."""
    info = _cpu_info()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": _name(info),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "flags": sorted(flag for flag in flags if any(word in flag for word in _TOLD)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _name(info: dict[str, str]) -> str:
    """The processor's name; virtual machines tell generations apart by family and model only."""
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        name += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    return name


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
