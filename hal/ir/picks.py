"""Which positions of a build's logits are computed; see :mod:`hal.passes.pick_positions`."""

from __future__ import annotations

LOGITS = "logits"
"""Output float [batch, sequence, vocab] of a language model."""

PICK = "hal.pick"
"""Input int64 [batch, picks] of a build: positions of each row that logits are computed for."""
