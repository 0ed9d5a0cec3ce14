"""onnxruntime-genai's builder: ``genai_model.py CHECKPOINT OUTPUT PRECISION``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_QUANTIZED = ("block_size=32", "accuracy_level=4")


def main(source: str, output: str, precision: str) -> int:
    """Build as its command line does; 4 and 8 bits in blocks of 32 with rounded activations."""
    extra = [*(_QUANTIZED if precision.startswith("int") else ()), "prune_lm_head=true"]
    if json.loads((Path(source) / "config.json").read_text())["tie_word_embeddings"]:
        extra.append("shared_embeddings=true")
    with tempfile.TemporaryDirectory() as cache:
        return subprocess.call(
            [
                sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source,
                "-o", output, "-p", precision, "-e", "cpu", "-c", cache,
                "--extra_options", *extra,
            ]
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], sys.argv[2], sys.argv[3]))
