"""Environments of vendors' software and tool chains, each in a folder of its own.

Python packages of vendors overwrite each other (several install a module of the same name), and
tool chains need no installation to run, so each set of them has a virtual environment, and a
folder into which files of Debian packages are unpacked. It is named by what is in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hal.errors import TargetError

_TAIL = 3
_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Environment:
    """What ``pip`` installs and which Debian packages are unpacked, and where.

    A Debian package comes from this system's sources, or as ``NAME/SUITE`` from Debian's own.
    """

    packages: tuple[str, ...] = ()
    debian: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    """Packages that ``pip`` installs without what they require."""

    @property
    def folder(self) -> Path:
        """In ``$HAL_ENVIRONMENTS``, or among the user's data."""
        chosen = os.environ.get("HAL_ENVIRONMENTS")
        data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        home = Path(chosen) if chosen else data / "hal" / "environments"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        facts = [version, sorted(self.packages), sorted(self.debian)]
        if self.alone:
            facts.append(sorted(self.alone))
        return home / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def files(self) -> Path:
        """Where Debian packages are unpacked."""
        return self.folder / "files"

    @property
    def made(self) -> bool:
        """Whether it is complete; one of nothing is."""
        wanted = self.packages or self.debian or self.alone
        return not wanted or (self.folder / "made.json").exists()

    def require(self, target: str) -> Environment:
        """Itself.

        Raises:
            TargetError: it is not made yet; the hint says how.
        """
        if not self.made:
            needed = (*self.alone, *self.packages, *self.debian)
            raise TargetError(
                f"target {target!r} needs {_listed(needed)} in an environment of its own",
                f"hal targets setup {target}",
            )
        if why := self.damage():
            raise TargetError(
                f"the environment of target {target!r} {why}", f"hal targets setup {target}"
            )
        return self

    def damage(self, *, files: bool = False) -> str:
        """What is wrong with the packages that are there, in a phrase, or nothing.

        Versions are looked at, and with ``files`` whether each file of a package is there.
        """
        places = [str(p) for p in (self.folder / "venv").glob("lib/python*/site-packages")]
        for package in (*self.packages, *self.alone):
            name, _, version = package.partition("==")
            plain = name.partition("[")[0]
            for found in importlib.metadata.distributions(name=plain, path=places):
                # As for pip, 1.0 is 1.0+local, too.
                if version not in ("", found.version, found.version.partition("+")[0]):
                    return f"wants {package} and has {found.version}"
                for file in (found.files or ()) if files else ():
                    if file.suffix != ".pyc" and not Path(str(found.locate_file(file))).exists():
                        return f"lacks {file} of {package}"
        return ""

    def make(self, say: Callable[[str], None]) -> Path:
        """Make it if it is not there, told with ``say`` what happens; its folder.

        Raises:
            TargetError: a package cannot be had; says which command failed and its last words.
        """
        if self.made and (self.python.exists() or not (self.packages or self.alone)):
            if not (why := self.damage(files=True)):
                return self.folder
            say(f"it {why}: making it anew")
        # A virtual environment does not survive being renamed: it is made in place, and counts
        # only once the file that says so is there.
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "made.json").unlink(missing_ok=True)
        if self.packages or self.alone:
            say("making a virtual environment")
            _run([sys.executable, "-m", "venv", "--clear", str(self.folder / "venv")])
        for packages, options in ((self.packages, ()), (self.alone, ("--no-deps",))):
            if packages:
                say(f"installing {', '.join(packages)}")
                pip = [str(self.python), "-m", "pip", "install", "--quiet"]
                _run([*pip, *options, *packages])
        if self.debian:
            say(f"unpacking {_listed(self.debian)}")
            self.files.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory() as downloads:
                _download(self.debian, Path(downloads))
                for package in sorted(Path(downloads).glob("*.deb")):
                    _run(["dpkg", "-x", str(package), str(self.files)])
        (self.folder / "made.json").write_text(json.dumps(dataclasses.asdict(self)))
        return self.folder


def _listed(packages: Sequence[str]) -> str:
    """The first of them, by name."""
    more = len(packages) - _SHOWN
    return ", ".join(packages[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


_ARCHIVE = "http://deb.debian.org/debian"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def _download(packages: Sequence[str], folder: Path) -> None:
    """Fetch ``.deb`` files; suites get lists of their own, so this system's are left alone."""
    named = [tuple(package.partition("/")[::2]) for package in packages]
    for suite in sorted({suite for _, suite in named}):
        names = [name for name, where in named if where == suite]
        options: list[str] = []
        if suite:
            if not _KEYRING.exists():
                raise TargetError(
                    f"{' and '.join(names)} of {suite!r} cannot be checked: {_KEYRING} is missing",
                    "install debian-archive-keyring",
                )
            lists = folder / suite
            (lists / "state" / "lists" / "partial").mkdir(parents=True)
            (lists / "cache" / "archives" / "partial").mkdir(parents=True)
            (lists / "status").touch()
            source = f"deb [signed-by={_KEYRING}] {_ARCHIVE} {suite} main\n"
            (lists / "sources.list").write_text(source)
            facts = {
                "Dir::Etc::sourcelist": lists / "sources.list",
                "Dir::Etc::sourceparts": "/dev/null",
                "Dir::State": lists / "state",
                "Dir::State::status": lists / "status",
                "Dir::Cache": lists / "cache",
            }
            options = [word for key, value in facts.items() for word in ("-o", f"{key}={value}")]
            _run(["apt-get", *options, "update"])
        _run(["apt-get", *options, "download", *names], folder)


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
