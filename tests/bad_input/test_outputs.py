"""Outputs that cannot be written, and compiles that are interrupted."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hal
from tests import files
from tests.bad_input.cases import ROUTE, Case, check_cli


def test_an_output_in_a_folder_that_does_not_exist_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    case = Case("", hal.BundleError, lambda f: f, ("nowhere does not exist",), "mkdir -p")
    output = tmp_path / "nowhere" / "mlp.hal"
    with pytest.raises(hal.BundleError, match="nowhere does not exist"):
        hal.compile(model, target=ROUTE, output=output)
    check_cli(case, ["compile", str(model), "-o", str(output), "--target", ROUTE], capsys)
    assert files.listing(tmp_path).keys() == {"mlp.onnx"}


STEPS = [
    *(f"compiler.{name}" for name in ("write_graph", "write_samples")),
    *(f"compiler.{name}" for name in ("build_target", "write_manifest")),
    "bundle.output.pack",
]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, "no space left on the device"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_at_every_step(
    step: str, code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr(f"hal.{step}", fail)
    with pytest.raises(hal.BundleError) as caught:
        hal.compile(model, target=ROUTE, output=tmp_path / "mlp.hal")
    assert caught.value.message == f"cannot write {tmp_path / 'mlp.hal'}: {reason}"
    assert caught.value.hint == "choose another output, or make room"
    assert files.listing(tmp_path).keys() == {"mlp.onnx"}


NAMESPACE = ["unshare", "-r", "-m"]


def can_mount() -> bool:
    """Whether this user may mount a small file system in a name space of their own."""
    try:
        command = [*NAMESPACE, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


FULL_DISK = """
import os, sys
from hal.cli import main
folder, model = sys.argv[1:]
def compile(output):
    return main(["compile", model, "-o", output, "--target", "host:onnxruntime"])
assert compile(model + ".hal") == 0  # from now on the build is in the cache
for size in (8, 16, 32):
    os.system(f"mount -t tmpfs -o size={size}k none {folder}")
    print(compile(folder + "/m.hal"), os.listdir(folder))
os.system(f"mount -o remount,ro {folder}")
print(compile(folder + "/m.hal"), os.listdir(folder))
"""


@pytest.mark.skipif(sys.platform != "linux" or not can_mount(), reason="needs mount name spaces")
def test_a_full_and_a_read_only_file_system_are_told(tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    (tmp_path / "small").mkdir()
    result = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", FULL_DISK, str(tmp_path / "small"), str(model)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.splitlines()[-4:] == ["2 []"] * 4, result.stderr
    place = tmp_path / "small" / "m.hal"
    full = [
        f"error: cannot write {place}: no space left on the device",
        "hint: choose another output, or make room",
    ]
    assert result.stderr.splitlines() == [
        *full * 3,
        f"error: cannot write {place}: the file system is read-only",
        "hint: choose another output, or make room",
    ]


# -- interruption -----------------------------------------------------------------------------

INTERRUPTED = """
import signal, sys, threading
import hal.compiler
from hal.cli import main

# A shell that runs this in the background has it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

def wait(*_, **__):
    print("building", flush=True)
    threading.Event().wait(60)

hal.compiler.build_target = wait
sys.exit(main(["compile", sys.argv[1], "-o", sys.argv[2], "--target", "host:onnxruntime"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGINT, 2, "mlp.hal"),
        (signal.SIGTERM, 143, "mlp"),
        (signal.SIGKILL, -9, "mlp.hal"),
    ],
)
def test_an_interrupted_compile_leaves_no_bundle(
    number: signal.Signals, code: int, name: str, tmp_path: Path
) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(model), str(tmp_path / "out" / name)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in err
    left = [p.name for p in (tmp_path / "out").iterdir()]
    if (
        number == signal.SIGKILL
    ):  # nothing can clean up then; what is left is never taken for a bundle
        assert [n for n in left if not n.startswith(f".{name}.tmp-")] == []
        with pytest.raises(hal.BundleError):
            hal.load(tmp_path / "out" / name)
    else:
        assert left == []


def test_a_file_that_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    model = files.save_mlp(tmp_path / "mlp.onnx")
    before = model.read_bytes()
    with pytest.raises(hal.BundleError, match="exists and is not a bundle"):
        hal.compile(model, output=model)
    assert model.read_bytes() == before
