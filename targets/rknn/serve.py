"""The worker's side: builds programs with rknn-toolkit2 and runs its simulator.

It runs as a plain file in an environment of its own, with the toolkit and without hal. What the
toolkit prints is read: its table of layers is the only place that says what runs where.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "provider"))
import serving  # type: ignore[import-not-found]

LAYER = re.compile(r"D RKNN: \[[^]]*\]\s+\d+\s+(\w+)\s+(\w+)\s+(NPU|CPU|GPU)\s.*\s\w+:(\S+)\s*$")
"""A row of the table: the layer's operator, dtype and place, and what it is named after."""
BORDERS = ("InputOperator", "OutputOperator")


class Refused(Exception):  # noqa: N818 - an answer and no error
    """The toolkit does not take a model; says why."""


class Server:
    """Answers requests for the chip that the first one, ``open``, names."""

    def __init__(self) -> None:
        from rknn.api import RKNN  # type: ignore[import-not-found]

        self.toolkit = RKNN
        self.platform = ""
        self.session: Any = None
        self.shapes: list[list[int]] = []

    def open(self, head: dict[str, Any], _arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Say for which chip programs are built."""
        self.platform = head["platform"]
        return {}

    def build(self, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Build a program, written to ``output`` if that is given.

        The answer has ``layers`` (operator, dtype, place, what it is named after), or ``refused``.
        """
        try:
            session, layers = self._built(arrays["model"], head["weights"])
        except Refused as reason:
            return {"refused": str(reason)}
        try:
            if head.get("output"):
                with serving.printed() as log:
                    failed = session.export_rknn(head["output"])
                if failed:
                    raise RuntimeError(told(log[0]))
        finally:
            session.release()
        return {"layers": layers}

    def load(self, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Build a program for the simulator, which reads none that is finished."""
        self.session, _ = self._built(arrays["model"], head["weights"])
        with serving.printed() as log:
            failed = self.session.init_runtime()
        if failed:
            raise RuntimeError(told(log[0]))
        self.shapes = head["shapes"]
        return {}

    def run(
        self, head: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Run the simulator once."""
        # Without a format the toolkit takes images with their channels last.
        formats = ["nchw" if a.ndim == 4 else "undefined" for a in arrays.values()]
        results, failure = None, ""
        with serving.printed() as log:
            try:
                results = self.session.inference(inputs=list(arrays.values()), data_format=formats)
            except Exception as error:  # noqa: BLE001 - the toolkit raises what it likes
                failure = last_line(str(error))
        if results is None or len(results) != len(head["outputs"]):
            raise RuntimeError(failure or told(log[0]))
        for name, array, shape in zip(head["outputs"], results, self.shapes, strict=True):
            if list(array.shape) != shape:
                raise RuntimeError(f"output {name!r} came as {list(array.shape)}, not {shape}")
        return {}, dict(zip(head["outputs"], results, strict=True))

    def _built(self, model: np.ndarray, weights: str) -> tuple[Any, list[list[str]]]:
        """A session with a finished program, and its layers.

        Raises:
            Refused: the toolkit does not take the model.
        """
        session = self.toolkit(verbose=True)
        with in_folder() as folder:
            path = write(model, weights, Path(folder))
            failure = ""
            with serving.printed() as log:
                try:
                    failed = (
                        session.config(target_platform=self.platform)
                        or session.load_onnx(model=str(path))
                        or session.build(do_quantization=False)
                    )
                except Exception as error:  # noqa: BLE001 - the toolkit raises what it likes
                    failed, failure = True, last_line(str(error)) or type(error).__name__
        if failed:
            session.release()
            raise Refused(failure or told(log[0]))
        found = [match for line in log[0].splitlines() if (match := LAYER.search(line))]
        if not found:
            raise RuntimeError("the toolkit does not say what runs where")
        return session, [list(m.groups()) for m in found if m[1] not in BORDERS]


def write(model: np.ndarray, weights: str, folder: Path) -> Path:
    """Put a model with its weights into a folder, in one file."""
    import onnx

    proto = onnx.load_model_from_string(model.tobytes())
    onnx.load_external_data_for_model(proto, weights)
    path = folder / "model.onnx"
    onnx.save(proto, str(path))
    return path


def told(log: str) -> str:
    """The last error that the toolkit printed."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in log.splitlines()]
    errors = [line[2:].strip() for line in lines if line.startswith("E ")]
    return last_line("\n".join(errors)) or last_line("\n".join(lines)) or "no reason is given"


def last_line(text: str) -> str:
    """The last line with words; of a traceback that is what happened."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else ""


@contextlib.contextmanager
def in_folder() -> Iterator[str]:
    """A folder that is there for the block: the toolkit leaves files where it runs."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


if __name__ == "__main__":
    serving.serve(Server)
