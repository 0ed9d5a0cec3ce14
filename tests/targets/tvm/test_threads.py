"""How many threads kernels run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tvm")

SCRIPT = """
import os
import numpy as np, tvm
from hal.kernels.matmul import row_major
from hal.targets.tvm.program import use_threads

def threads():
    return len(os.listdir("/proc/self/task"))

module = tvm.IRModule({{"main": row_major(64, 64, 8).with_attr("global_symbol", "main")}})
product = tvm.compile(module, target="llvm")["main"]
arrays = [tvm.runtime.tensor(np.zeros((64, 64), np.float32)) for _ in range(3)]
before = threads()
use_threads({count})
product(*arrays)
print(threads() - before + 1)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize(
    ("count", "said", "expected"),
    [
        (None, {}, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1),
        (None, {"TVM_NUM_THREADS": "4"}, 4),
        (3, {"OMP_NUM_THREADS": "1"}, 3),
    ],
)
def test_kernels_run_on_as_many_threads_as_was_said(
    count: int | None, said: dict[str, str], expected: int
) -> None:
    limits = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in limits} | said
    script = SCRIPT.format(count=count)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == expected
