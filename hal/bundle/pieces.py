"""What a bundle folder is made of, besides its builds: graph, weights, samples, the manifest."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

import hal
from hal.bundle.manifest import (
    GRAPH,
    MANIFEST,
    MANIFEST_DIGEST,
    FileRecord,
    Manifest,
    TensorRecord,
    digest_path,
)
from hal.ir import Graph, TensorSpec
from hal.ir.weights import write_weights

SAMPLES = "samples.safetensors"
SAMPLE_BYTES = 16 << 20
"""Example inputs up to this size are kept in the bundle, for `hal verify` to use again."""

TOKENIZER_FOLDER = "tokenizer"
"""Where the source's tokenizer files and generation settings go in a bundle."""


def describe(graph: Graph, source: Mapping[str, Any], passes: list[dict[str, Any]]) -> Manifest:
    """The manifest of a graph, without builds and files.

    Args:
        graph: the neutral graph.
        source: where the model came from.
        passes: reports of the passes that ran.
    """
    signature = graph.signature()
    specs = graph.input_specs()
    tensors = [v.const_value for v in graph.graph.initializers.values() if v.const_value]
    return Manifest(
        name=graph.name,
        task=str(graph.metadata.get("task", "generic")),
        producer={"hal": hal.__version__},
        source=dict(source),
        inputs=[_tensor_record(s) for s in signature.inputs],
        outputs=[_tensor_record(s) for s in signature.outputs],
        state=[
            {**s.to_json(), "dtype": specs[s.input].dtype, "dims": list(specs[s.input].dims or ())}
            for s in graph.state
        ],
        metadata=graph.metadata,
        weights={"bytes": graph.weight_bytes(), "tensors": len(tensors)},
        passes=passes,
    )


def _tensor_record(spec: TensorSpec) -> TensorRecord:
    return TensorRecord(
        **{**dataclasses.asdict(spec), "dims": None if spec.dims is None else list(spec.dims)}
    )


def write_graph(graph: Graph, folder: Path) -> tuple[Graph, dict[str, FileRecord]]:
    """Write weights and ``graph.onnx``; return the graph on the written weights, and digests."""
    files = write_weights(graph, folder)
    path = folder / GRAPH
    model = graph.stamp()
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    names = [path, *files]
    digests = {p.name: digest_path(p) for p in names}
    return graph, digests


def write_samples(folder: Path, steps: Sequence[Mapping[str, Any]]) -> str | None:
    """Keep inputs of calls; the file's name, or None if they are too large or no numbers."""
    arrays = {f"{i}/{name}": array for i, step in enumerate(steps) for name, array in step.items()}
    plain = all(isinstance(a, np.ndarray) and a.dtype.kind in "fiub" for a in arrays.values())
    if not arrays or not plain or sum(a.nbytes for a in arrays.values()) > SAMPLE_BYTES:
        return None
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, folder / SAMPLES)
    return SAMPLES


def copy_assets(assets: Mapping[str, Path], folder: Path) -> None:
    """Copy a tokenizer's files, by their names in the bundle."""
    for name, path in assets.items():
        goal = folder / TOKENIZER_FOLDER / name
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, goal)


def not_neutral(name: str) -> bool:
    """Whether a member belongs to builds and not to the neutral graph."""
    return name.startswith("builds/") or name in (MANIFEST, MANIFEST_DIGEST)
