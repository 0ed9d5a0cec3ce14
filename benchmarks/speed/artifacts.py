"""Files that contenders load, each made once in the cache folder by a script of ``make/``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from speed.failures import Unavailable, reason
from speed.venvs import Environments

MAKERS = Path(__file__).resolve().parent / "make"
_LIMIT = 1800


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A file or folder, and how it is made.

    Attributes:
        name: where it lies in the cache.
        script: of ``make/``, run in ``environment`` with ``arguments``; ``{name}`` in them stands
            for the path of another artifact of :attr:`needs`, ``{output}`` for its own.
        needs: artifacts that must be there before, by the names that arguments use.
        part: what a contender loads within it.
        loaded_in: where it is loaded, if not in the environment that makes it.
        of_hal: made by hal itself: made again when hal's own code has changed.
    """

    name: str
    script: str
    environment: str
    arguments: tuple[str, ...]
    needs: tuple[tuple[str, Artifact], ...] = ()
    folder: bool = True
    part: str = ""
    loaded_in: str = ""
    of_hal: bool = False


class Artifacts:
    """Makes what is missing, and remembers what could not be made.

    ``keep``: bundles that an earlier state of hal's code made are good enough.
    """

    def __init__(
        self,
        folder: Path,
        environments: Environments,
        say: Callable[[str], None],
        *,
        keep: bool = False,
    ) -> None:
        self._folder, self._environments, self._say = folder, environments, say
        self._keep = keep
        self._failed: dict[str, str] = {}

    def path(self, artifact: Artifact) -> Path:
        """Where the artifact is, made if need be.

        Raises:
            Unavailable: it cannot be made; says why.
        """
        output = self._folder / artifact.name
        stamp = output.with_name(output.name + ".made.json")
        if not self._current(artifact, stamp):
            if artifact.name in self._failed:
                raise Unavailable(self._failed[artifact.name])
            try:
                self._make(artifact, output, stamp)
            except Unavailable as error:
                self._failed[artifact.name] = str(error)
                raise
        return output / artifact.part if artifact.part else output

    def _current(self, artifact: Artifact, stamp: Path) -> bool:
        if not stamp.exists():
            return False
        if self._keep or not artifact.of_hal:
            return True
        made: dict[str, object] = json.loads(stamp.read_text())
        return made["code"] == code_digest()

    def seconds(self, artifact: Artifact) -> float | None:
        """How long it took to make, if this is known."""
        stamp = self._folder / f"{artifact.name}.made.json"
        return json.loads(stamp.read_text())["seconds"] if stamp.exists() else None

    def _make(self, artifact: Artifact, output: Path, stamp: Path) -> None:
        paths = {name: str(self.path(need)) for name, need in artifact.needs}
        python = self._environments.python(artifact.environment)
        self._say(f"making {artifact.name}")
        with contextlib.suppress(OSError):
            output.unlink()
        shutil.rmtree(output, ignore_errors=True)
        (output if artifact.folder else output.parent).mkdir(parents=True, exist_ok=True)
        paths["output"] = str(output)
        arguments = [_filled(text, paths) for text in artifact.arguments]
        start = time.perf_counter()
        log = output.with_name(output.name + ".log")
        with log.open("w") as messages:
            try:
                code = subprocess.run(
                    [str(python), str(MAKERS / artifact.script), *arguments],
                    stdout=messages, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=_LIMIT,
                    cwd=output.parent,  # modules that lie here must not be taken for packages
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise Unavailable(f"{artifact.name} took more than {_LIMIT} s to make") from error
        if code:
            raise Unavailable(f"{artifact.script}: {reason(log.read_text(errors='replace'))}")
        facts = {"seconds": time.perf_counter() - start, "code": code_digest()}
        stamp.write_text(json.dumps(facts) + "\n")


def _filled(text: str, paths: dict[str, str]) -> str:
    for name, path in paths.items():
        text = text.replace("{" + name + "}", path)
    return text


@functools.cache
def code_digest() -> str:
    """Names hal's own code as it is now, on which bundles depend."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for folder in ("hal", "passes", "kernels", "targets"):
        for path in sorted((root / folder).rglob("*.*")):
            if path.suffix in (".py", ".toml"):
                found.update(path.read_bytes())
    return found.hexdigest()[:16]


def digest(text: str) -> str:
    """A short name for options."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]
