"""Environments of peers: each a virtual environment of its own, with pinned versions."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from speed.failures import Unavailable, reason

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Environment:
    """What ``pip`` installs, what it takes out again, and the package whose version is told."""

    packages: tuple[str, ...]
    shown: tuple[str, ...]
    removed: tuple[str, ...] = ()


ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENTS = {
    # What a deployment has: without torch, which TVM imports wherever it is installed.
    "hal-runtime": Environment(("--editable", f"{ROOT}[tvm]"), ()),
    "llama.cpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0"), ("llama-cpp-python",)
    ),
    "onnxruntime-genai": Environment(
        ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "torch==2.13.0",
         "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
        ("onnxruntime-genai", "onnxruntime"),
    ),
    "openvino": Environment(
        ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0",
         "nncf==3.4.0", "torch==2.13.0"),
        ("openvino", "openvino-genai", "nncf", "optimum-intel"),
        # It comes as a dependency that does not go with every build of torch, and breaks imports.
        removed=("torchvision",),
    ),
}  # fmt: skip
"""By name. PyTorch, onnxruntime by itself and compilers run in this process's environment."""

OWN_PACKAGES = ("hal-compiler", "torch", "apache-tvm", "onnxruntime", "transformers")
_ALIASES = {
    "hal-runtime": "hal",
    "llama.cpp": "llama",
    "onnxruntime-genai": "genai",
    "openvino": "openvino",
}
_STAMP = "installed.json"


class Environments:
    """Makes environments under a folder, each once, and knows their Pythons."""

    def __init__(self, folder: Path, say: Say, torch_index: str | None = None) -> None:
        self._folder, self._say, self._index = folder, say, torch_index
        self._failed: dict[str, str] = {}

    def python(self, name: str) -> Path:
        """The interpreter of an environment, installed if need be; ``hal``: this process's own.

        Raises:
            Unavailable: it cannot be set up; says why.
        """
        if name == "hal":
            return Path(sys.executable)
        if name in self._failed:
            raise Unavailable(self._failed[name])
        try:
            return self._installed(name)
        except (Unavailable, OSError, subprocess.SubprocessError) as error:
            self._failed[name] = f"no environment for {name}: {error}"
            raise Unavailable(self._failed[name]) from error

    def _installed(self, name: str) -> Path:
        wanted, folder = ENVIRONMENTS[name], self._folder / _ALIASES[name]
        python, stamp = folder / "bin" / "python", folder / _STAMP
        pins = sorted(wanted.packages)
        if stamp.exists() and json.loads(stamp.read_text()) == pins and python.exists():
            return python
        if not (python.exists() and self._has(python, wanted.packages)):
            self._say(f"installing {name}: {', '.join(wanted.packages)}")
            self._install(folder, wanted)
        stamp.write_text(json.dumps(pins) + "\n")
        return python

    def _install(self, folder: Path, wanted: Environment) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        index = ["--extra-index-url", self._index] if self._index else []
        _run([*pip, "install", "--quiet", *index, *wanted.packages])
        if wanted.removed:
            _run([*pip, "uninstall", "--quiet", "--yes", *wanted.removed])

    def _has(self, python: Path, packages: Sequence[str]) -> bool:
        """Whether an environment that somebody else made has the very versions."""
        if any("==" not in package for package in packages):
            return False
        found = versions(python, [package.split("==")[0] for package in packages])
        return all(
            found.get(name, "").split("+")[0] == version
            for name, version in (package.split("==") for package in packages)
        )

    def versions(self) -> dict[str, str]:
        """Versions of what contenders run on, in those environments that are there."""
        found = versions(Path(sys.executable), OWN_PACKAGES)
        for name, wanted in ENVIRONMENTS.items():
            python = self._folder / _ALIASES[name] / "bin" / "python"
            if python.exists():
                found |= versions(python, wanted.shown)
        return found


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Installed versions by package; packages that are not there are left out."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps({p: found[p.lower()] for p in sys.argv[1:] if p.lower() in found}))"
    )
    done = subprocess.run(
        [str(python), "-c", script, *packages], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _run(command: Sequence[str]) -> None:
    """Run to the end.

    Raises:
        Unavailable: it fails; has the last line that names an error.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise Unavailable(reason(done.stderr))
