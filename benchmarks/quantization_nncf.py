"""NNCF's weight compression of one ONNX model; runs by itself, where ``nncf`` and ``openvino`` are.

::

    python quantization_nncf.py FOLDER

FOLDER holds ``model.onnx`` (``input_ids [1, window]`` to ``logits``), ``calibration.npy`` and
``windows.npy`` (token ids ``[rows, window]``), and ``done.json``: what to leave out. For each
variant a line of JSON is printed, and its logits on the windows, float32 ``[rows, window, vocab]``,
are written to ``logits.npy``; a line on standard input asks for the next. The float model comes
first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13

FLOAT_RUN = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "INFERENCE_NUM_THREADS": int(os.environ.get("OMP_NUM_THREADS", "1")),
}
"""Activations stay float32, so that weights alone differ."""

PLAIN: dict[str, Any] = {}
AWQ = {"awq": True}
SCALES = {"scale_estimation": True}
BOTH = {"awq": True, "scale_estimation": True}
GPTQ = {"gptq": True}
ALL = {"gptq": True, "scale_estimation": True}
FORMATS: dict[str, tuple[str, int | None, tuple[dict[str, Any], ...]]] = {
    "int8_sym-channel": ("INT8_SYM", None, (PLAIN,)),
    "int8_asym-channel": ("INT8_ASYM", None, (PLAIN,)),
    "int4_sym-g32": ("INT4_SYM", 32, (PLAIN, AWQ, SCALES, BOTH, GPTQ, ALL)),
    "int4_asym-g32": ("INT4_ASYM", 32, (PLAIN, AWQ, SCALES, BOTH, GPTQ, ALL)),
    "int4_sym-g64": ("INT4_SYM", 64, (PLAIN, BOTH, GPTQ)),
    "int4_asym-g64": ("INT4_ASYM", 64, (PLAIN, BOTH, GPTQ)),
    "nf4-g32": ("NF4", 32, (PLAIN, BOTH)),
    "mxfp4-g32": ("MXFP4", 32, (PLAIN, AWQ)),
    "fp8_e4m3-g32": ("FP8_E4M3", 32, (PLAIN,)),
    "int3_sym-g32": ("INT3_SYM", 32, (PLAIN, BOTH, GPTQ)),
    "int2_sym-g32": ("INT2_SYM", 32, (PLAIN, BOTH, GPTQ)),
}
"""Name: mode, group, options."""


def read_model(folder: Path) -> ov.Model:
    """The float model, its weights stored ``[out, in]``: NNCF's GPTQ takes no others."""
    model = ov.Core().read_model(folder / "model.onnx")
    for node in model.get_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        weight = node.input_value(1).get_node()
        if weight.get_type_name() == "Constant" and len(weight.get_output_shape(0)) == 2:
            turned = opset13.constant(np.ascontiguousarray(weight.data.T))
            product = opset13.matmul(node.input_value(0), turned, False, True)
            product.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(product.output(0))
    return model


def unquantized(model: ov.Model) -> list[str]:
    """Names of the embedding's look-up and of the head's product."""
    names = [
        node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "Gather"
    ]
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return [*names, node.get_friendly_name()]


def stored_bits(model: ov.Model) -> tuple[float, int]:
    """Bits for each quantized weight, with scales and zero points, and how many weights."""
    bits = weights = 0
    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        constants = _constants(node.input_value(1).get_node())
        if not constants or all(c.get_element_type().bitwidth >= 16 for c in constants):
            continue
        weights += max(int(np.prod(c.get_output_shape(0))) for c in constants)
        bits += sum(
            int(np.prod(c.get_output_shape(0))) * c.get_element_type().bitwidth for c in constants
        )
    return (bits / weights if weights else 32.0), weights


def _constants(node: Any) -> list[Any]:
    """Constants that a weight is computed from; shapes of reshapes are none."""
    kind = node.get_type_name()
    if kind == "Constant":
        return [node]
    if kind in ("Convert", "Reshape", "Transpose"):
        return _constants(node.input_value(0).get_node())
    if kind in ("Multiply", "Subtract"):
        return [c for i in (0, 1) for c in _constants(node.input_value(i).get_node())]
    return []


def logits(model: ov.Model, windows: np.ndarray) -> np.ndarray:
    """Logits float32 ``[rows, window, vocab]``."""
    compiled = ov.Core().compile_model(model, "CPU", FLOAT_RUN)
    return np.concatenate([compiled({"input_ids": row[None]})[0] for row in windows])


def main() -> None:
    """All variants, one after the other."""
    folder = Path(sys.argv[1])
    windows, calibration = np.load(folder / "windows.npy"), np.load(folder / "calibration.npy")

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)
        sys.stdin.readline()

    def measured(model: ov.Model, **facts: Any) -> None:
        np.save(folder / "logits.npy", logits(model, windows))
        answer(**facts)

    read = read_model(folder)
    versions = {"nncf": nncf.__version__, "openvino": ov.__version__.split("-")[0]}
    answer(versions=versions)
    done = [tuple(x) for x in json.loads((folder / "done.json").read_text())]
    if ("float32", "none") not in done:
        measured(read, format="float32", method="none", bits=32.0, seconds=0.0)
    kept = nncf.IgnoredScope(names=unquantized(read))
    for name, (mode, group, variants) in FORMATS.items():
        for given in variants:
            method = "+".join(given) or "rtn"
            if (name, method) in done:
                continue
            start = time.perf_counter()
            try:
                options = dict(given)
                if given:
                    samples = [{"input_ids": row[None]} for row in calibration]
                    options |= {"dataset": nncf.Dataset(samples), "subset_size": len(samples)}
                if group is not None:
                    options |= {"group_size": group, "ratio": 1.0, "all_layers": True}
                made = nncf.compress_weights(
                    read_model(folder),
                    mode=nncf.CompressWeightsMode[mode],
                    ignored_scope=kept,
                    **options,
                )
                seconds = time.perf_counter() - start
                bits, weights = stored_bits(made)
                measured(
                    made, format=name, method=method, bits=bits, seconds=seconds, weights=weights
                )
            except Exception as error:  # noqa: BLE001 - what cannot be made or run is told
                text = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                answer(format=name, method=method, error=text)


if __name__ == "__main__":
    main()
