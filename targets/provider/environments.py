"""Environments of vendors' runtimes: each a virtual environment with pinned packages.

Packages of vendors overwrite each other (several install a module of the same name), so each
set of them has its own folder, named by what is in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hal.errors import TargetError
from hal.targets.provider.options import ProviderOptions

_TAIL = 3


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where the packages of a route are, or will be."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def files(self) -> Path:
        """Where Debian packages are unpacked."""
        return self.folder / "files"

    @property
    def exists(self) -> bool:
        """Whether it is complete."""
        return (self.folder / "made.json").exists()


def environment_of(options: ProviderOptions) -> Environment:
    """The environment for a route, made or not."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    facts = [version, sorted(options.packages), sorted(options.debian)]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Environment(_home() / name)


def _home() -> Path:
    """``$HAL_ENVIRONMENTS``, or a folder among the user's data."""
    chosen = os.environ.get("HAL_ENVIRONMENTS")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(chosen) if chosen else data / "hal" / "environments"


def require(options: ProviderOptions, target: str) -> Environment:
    """The environment for a route.

    Raises:
        TargetError: it is not made yet; the hint says how.
    """
    found = environment_of(options)
    if not found.exists:
        raise TargetError(
            f"target {target!r} needs {', '.join(options.packages)} in an environment of its own",
            f"hal targets setup {target}",
        )
    return found


def make(options: ProviderOptions, say: Callable[[str], None]) -> Environment:
    """Make the environment if it is not there; told with ``say`` what happens.

    Raises:
        TargetError: a package cannot be had; says which command failed and its last words.
    """
    found = environment_of(options)
    if found.exists:
        return found
    # A virtual environment does not survive being renamed: it is made in place, and counts only
    # once the file that says so is there.
    found.folder.mkdir(parents=True, exist_ok=True)
    say("making a virtual environment")
    _run([sys.executable, "-m", "venv", "--clear", str(found.folder / "venv")])
    say(f"installing {', '.join(options.packages)}")
    _run([str(found.python), "-m", "pip", "install", "--quiet", "numpy", *options.packages])
    if options.debian:
        say(f"unpacking {', '.join(options.debian)}")
        found.files.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as downloads:
            _run(["apt-get", "download", *options.debian], Path(downloads))
            for package in sorted(Path(downloads).glob("*.deb")):
                _run(["dpkg", "-x", str(package), str(found.files)])
    made = {"packages": options.packages, "debian": options.debian}
    (found.folder / "made.json").write_text(json.dumps(made))
    return found


def _run(command: Sequence[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    except OSError as error:
        raise TargetError(f"{command[0]} cannot run: {error}", "install it") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-_TAIL:]
        raise TargetError(
            f"{' '.join(command[:4])} … failed: {' / '.join(words) or done.returncode}",
            "check the network and the free disk space",
        )
