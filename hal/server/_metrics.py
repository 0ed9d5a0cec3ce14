"""What an engine keeps, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from hal.runtime.meters import Histogram
from hal.server._model import Model

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(model: Model) -> str:
    """All figures of a model."""
    return "\n".join(_lines(model)) + "\n"


def _lines(model: Model) -> Iterator[str]:
    if model.embedder is not None:
        yield from _one("hal_embedded_texts", "Texts that were embedded.", model.embedder.texts)
        yield from _one("hal_embedded_tokens", "Tokens of those texts.", model.embedder.tokens)
    if model.engine is None:
        return
    f = model.engine.figures()
    yield from _one("hal_requests_running", "Requests that have a row.", f.running, "gauge")
    yield from _one("hal_requests_waiting", "Requests in the queue.", f.waiting, "gauge")
    name = "hal_requests_total"
    yield from (f"# HELP {name} Requests by how they ended.", f"# TYPE {name} counter")
    for outcome in ("finished", "cancelled", "rejected", "failed"):
        yield f'{name}{{outcome="{outcome}"}} {getattr(f, outcome)}'
    yield from _one("hal_prompt_tokens", "Tokens of prompts that were taken up.", f.prompt_tokens)
    yield from _one(
        "hal_reused_tokens", "Tokens of prompts that the cache had already.", f.reused_tokens
    )
    yield from _one("hal_generated_tokens", "Tokens that were generated.", f.new_tokens)
    yield from _one("hal_steps", "Runs of the model.", f.steps)
    yield from _one(
        "hal_cache_pages_in_use", "Pages of the cache that running requests hold.", f.pages, "gauge"
    )
    yield from _one(
        "hal_prefix_cache_pages",
        "Pages that are only kept for prompts that begin like an earlier one.",
        f.kept_pages,
        "gauge",
    )
    yield from _one(
        "hal_prefix_cache_rows", "Finished sequences that are kept.", f.kept_rows, "gauge"
    )
    yield from _histogram(
        "hal_time_to_first_token_seconds", "From a request to its first token.", f.first_token
    )
    yield from _histogram(
        "hal_time_per_token_seconds", "Between two tokens of a request.", f.next_token
    )


def _one(name: str, text: str, value: int, kind: str = "counter") -> Iterator[str]:
    name = f"{name}_total" if kind == "counter" else name
    yield from (f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}")


def _histogram(name: str, text: str, histogram: Histogram) -> Iterator[str]:
    yield from (f"# HELP {name} {text}", f"# TYPE {name} histogram")
    total = 0
    for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        total += count
        yield f'{name}_bucket{{le="{bound}"}} {total}'
    yield f"{name}_sum {histogram.total}"
    yield f"{name}_count {total}"
