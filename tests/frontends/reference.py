"""Run graphs in ONNX Runtime and compare them to torch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers as tf

from hal.ir import Graph


def session(graph: Graph) -> ort.InferenceSession:
    """An ONNX Runtime session of the neutral graph; hal ops run as their bodies."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = ir.serde.serialize_model(graph.clone().stamp())
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def run(sess: ort.InferenceSession, feeds: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Outputs by name."""
    names = [o.name for o in sess.get_outputs()]
    return dict(zip(names, sess.run(names, {k: v.numpy() for k, v in feeds.items()}), strict=True))


def empty_state(graph: Graph, batch: int) -> dict[str, torch.Tensor]:
    """State of no positions."""
    specs = graph.input_specs()
    sizes = {"batch": batch, "past": 0}
    return {
        s.input: torch.zeros([sizes.get(d, d) for d in specs[s.input].dims or ()])
        for s in graph.state
    }


def decode_difference(
    model: tf.PreTrainedModel, graph: Graph, batch: int, prompt: int, steps: int
) -> float:
    """Largest difference of logits over a prefill and greedy steps that start with no state."""
    sess = session(graph)
    state = empty_state(graph, batch)
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), generator=generator)
    cache, worst = None, 0.0
    for _ in range(steps + 1):
        with torch.no_grad():
            want = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = want.past_key_values
        got = run(sess, {"input_ids": ids, **state})
        worst = max(worst, float(np.abs(want.logits.numpy() - got["logits"]).max()))
        state = {s.input: torch.from_numpy(got[s.output]) for s in graph.state}
        ids = want.logits[:, -1:].argmax(-1)
    return worst
