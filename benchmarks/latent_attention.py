"""Decoding with a latent cache: absorbed, expanded, and as the model's own code does it.

::

    python benchmarks/latent_attention.py --context 1024,8192 --heads 16,128

One layer with the attention of DeepSeek-V3's configuration (``kv_lora_rank`` 512, rope 64, nope and
value heads of 128), random weights, small hidden size and vocabulary so that little else is
measured. ``exported``: the latent is cached and all history is expanded in every step; ``latent``:
the maps after the latent are absorbed into queries and output; ``expanded``: keys and values are
cached. Forms are interleaved; figures are medians of one decode step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from decode import fill, step_seconds
from rich.console import Console
from rich.table import Table

import hal

FORMS = ("exported", "latent", "expanded")


def model(heads: int) -> Any:
    """A language model of one dense layer with that attention."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        max_position_embeddings=16384,
    )
    return transformers.DeepseekV3ForCausalLM(config).eval()


def measure(
    heads: int, contexts: list[int], targets: list[str], steps: int
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each target and context."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        model(heads).save_pretrained(source)
        bundles = {
            form: hal.compile(source, target=targets, kv_cache=form, verify=False) for form in FORMS
        }
        rows = []
        for target in targets:
            sessions = {form: bundle.session(target) for form, bundle in bundles.items()}
            for context in contexts:
                row: dict[str, Any] = {"target": target, "heads": heads, "context": context}
                seconds: dict[str, list[float]] = {form: [] for form in FORMS}
                for _ in range(2):
                    for form, session in sessions.items():
                        fill(session, 1, context)
                        step_seconds(session, 1, 1)
                        seconds[form] += step_seconds(session, 1, steps)
                        session.reset()
                for form in FORMS:
                    row[f"{form}_ms"] = statistics.median(seconds[form]) * 1e3
                row["ratio"] = row["exported_ms"] / row["latent_ms"]
                rows.append(row)
        return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--heads", type=numbers, default=[16, 128])
    parser.add_argument("--context", type=numbers, default=[1024, 8192])
    parser.add_argument("--target", action="append")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    targets = arguments.target or ["host:onnxruntime", "host:tvm"]
    rows = [
        row
        for heads in arguments.heads
        for row in measure(heads, arguments.context, targets, arguments.steps)
    ]
    table = Table(title=f"one layer, milliseconds a step, hal {hal.__version__}")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
