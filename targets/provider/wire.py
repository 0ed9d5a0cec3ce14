"""Messages between hal and a worker process: a line of JSON, then the bytes of arrays.

Both sides run this file: hal as part of its package, the worker as a plain file next to
``serve.py`` in an environment that has NumPy and not much else.
"""

from __future__ import annotations

import json
from typing import IO, Any

import numpy as np


def send(stream: IO[bytes], head: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write a message. ``head`` must be JSON; arrays keep their order, dtypes and shapes."""
    # Not ascontiguousarray, which makes a vector of a scalar.
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    described = [
        {"name": n, "dtype": a.dtype.name, "shape": list(a.shape), "bytes": a.nbytes}
        for n, a in plain.items()
    ]
    stream.write(json.dumps({"head": head, "arrays": described}).encode() + b"\n")
    for array in plain.values():
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Read a message; None where the other side has closed its end."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    message = json.loads(line)
    arrays: dict[str, np.ndarray] = {}
    for item in message["arrays"]:
        data = stream.read(item["bytes"])
        if len(data) != item["bytes"]:
            return None
        array = np.frombuffer(bytearray(data), np.dtype(item["dtype"]))
        arrays[item["name"]] = array.reshape(item["shape"])
    return message["head"], arrays
