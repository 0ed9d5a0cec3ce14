"""What must work with the wheel and its core dependencies alone: run in a clean environment.

Loads, runs, verifies and retargets the bundle that ``make_bundle.py`` made, and uses the command line.
"""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import hal


def run(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("hal")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    for name in ("torch", "transformers", "tvm", "passes", "targets", "kernels"):
        assert importlib.util.find_spec(name) is None, f"{name} can be imported here"
    demo = importlib.util.find_spec("hal.demo_model")
    assert demo is not None
    assert (Path(next(iter(demo.submodule_search_locations or []))) / "config.json").is_file()
    names = [target.name for target in hal.list_targets()]
    assert {"host", "x86-64", "x86-64-v3", "x86-64-v4"} <= set(names), names
    assert "x86-64-v3" in run("targets", "list")

    bundle = hal.load(sys.argv[1])
    with bundle.session() as session:
        first = session.run({"input_ids": np.array([[1, 2, 3]])})["logits"]
        greedy = list(session.generate([1, 2, 3], max_new_tokens=8))
    assert first.shape == (1, 3, 64), first.shape
    with tempfile.TemporaryDirectory() as folder:
        other = bundle.retarget("x86-64:onnxruntime", output=Path(folder) / "other.hal")
        with other.session() as session:
            again = list(session.generate([1, 2, 3], max_new_tokens=8))
        assert greedy == again, (greedy, again)
        run("retarget", sys.argv[1], "--target", "host:onnxruntime", "-o", f"{folder}/third.hal")
        assert "top-1 agreement 100.0 %" in run("verify", f"{folder}/third.hal")
    try:
        hal.compile(Path(__file__).parent, output="never.hal")
    except hal.HalError as error:
        print(f"without torch, a Hugging Face directory gives: {error.message}")
    heavy = {"torch", "transformers", "tvm"} & set(sys.modules)
    assert not heavy, heavy
    print(
        f"hal {hal.__version__} works with its core dependencies: {sys.argv[1]} ran and retargeted"
    )


if __name__ == "__main__":
    main()
