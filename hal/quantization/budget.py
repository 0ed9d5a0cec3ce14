"""What quantization may cost: bounds on accuracy, or on bytes.

>>> parse_budget("top1>=0.99, kl<=0.02")
>>> parse_size("300MB")
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from hal.errors import InputError, did_you_mean

METRICS = {
    "top1": (">=", "share of positions or examples whose most likely answer stays the same"),
    "kl": ("<=", "KL(float ‖ quantized) of the next token, mean over positions, in nats"),
    "ppl": ("<=", "perplexity of the quantized model over that of the float model, as in 1.01x"),
    "cosine": (">=", "mean cosine between the outputs"),
}
"""Metrics by name: the direction that a bound on it has, and what it is."""

_BOUND = re.compile(r"([a-z0-9]+)\s*(<=|>=)\s*([0-9.]+(?:e-?\d+)?)(x?)$")
_SIZE = re.compile(r"([0-9.]+)\s*([kmg]?)(i?)b?$")
_HINT = "as in top1>=0.99, kl<=0.02, ppl<=1.01x or cosine>=0.999"


@dataclasses.dataclass(frozen=True)
class Bound:
    """``metric >= limit`` or ``metric <= limit``, by the metric."""

    metric: str
    limit: float

    def met(self, figures: Mapping[str, float]) -> bool:
        """Whether measured figures keep to it; NaN does not.

        Raises:
            InputError: the metric was not measured: it makes no sense for the model.
        """
        if self.metric not in figures:
            raise InputError(
                f"the budget names {self.metric!r}, which this model does not have",
                f"it has {', '.join(figures)}",
            )
        value = figures[self.metric]
        return value >= self.limit if METRICS[self.metric][0] == ">=" else value <= self.limit

    def __str__(self) -> str:
        """The text that :func:`parse_budget` reads."""
        return f"{self.metric}{METRICS[self.metric][0]}{self.limit:.10g}" + "x" * (
            self.metric == "ppl"
        )


def parse_budget(text: str) -> tuple[Bound, ...]:
    """Read bounds on accuracy, separated by commas; all have to be met.

    Raises:
        InputError: it does not parse, or a bound can never or always be met.
    """
    return tuple(_bound(part.strip().lower()) for part in text.split(","))


def _bound(text: str) -> Bound:
    found = _BOUND.match(text)
    if not found:
        raise InputError(f"the accuracy budget {text!r} does not parse", _HINT)
    metric, relation, number, times = found.groups()
    if metric not in METRICS:
        raise InputError(f"no metric {metric!r}", f"{did_you_mean(metric, METRICS)}; {_HINT}")
    if relation != METRICS[metric][0]:
        raise InputError(
            f"{text!r}: a bound on {metric} is {METRICS[metric][0]}", f"write it so; {_HINT}"
        )
    try:
        limit = float(number)
    except ValueError as error:
        raise InputError(f"{number!r} is no number", _HINT) from error
    if (times and metric != "ppl") or (metric in ("top1", "cosine") and not 0 < limit <= 1):
        raise InputError(f"{text!r}: {metric} is a share between 0 and 1", _HINT)
    if metric == "ppl" and limit < 1:
        raise InputError(
            f"{text!r}: perplexity is a multiple of the float model's, 1 or more", _HINT
        )
    return Bound(metric, limit)


def parse_size(text: str) -> int:
    """Read ``300MB`` (1e6), ``1.5GiB`` (2**30), ``800000``: bytes.

    Raises:
        InputError: it does not parse, or is nothing.
    """
    found = _SIZE.match(text.strip().lower())
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or number <= 0:
        raise InputError(f"the size budget {text!r} does not parse", "as in 300MB or 1.5GiB")
    power = " kmg".index(found[2] or " ")
    return int(number * (1024 if found[3] else 1000) ** power)
