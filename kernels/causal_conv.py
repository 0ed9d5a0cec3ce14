"""A causal depthwise convolution that starts from the positions before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T  # noqa: N812


def _silu(x: Any) -> Any:
    return x / (T.float32(1) + T.exp(T.float32(0) - x))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    "silu": _silu,
    "swish": _silu,
}
"""Activations of the output by the name that the op's attribute uses."""


@functools.lru_cache(maxsize=64)
def causal_conv(channels: int, taps: int, activation: str) -> Any:
    """``y[b, c, t] = act(bias[c] + sum over j of w[c, 0, j] * z[b, c, t + j])``; float32.

    ``z`` is ``past`` followed by ``x``, never made: ``x``, ``y`` ``[B, channels, S]``, ``past``
    ``[B, channels, taps - 1]``, ``weight [channels, 1, taps]``, ``bias [channels]``. ``present``
    gets the last ``taps - 1`` positions of ``z``. B and S are known at run time only.
    """
    act, back = ACTIVATIONS[activation], taps - 1

    @T.prim_func(s_tir=True)
    def causal_conv_with_state(  # type: ignore[no-untyped-def]
        x_data: T.handle,
        w_data: T.handle,
        b_data: T.handle,
        p_data: T.handle,
        y_data: T.handle,
        n_data: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int64()
        length = T.int64()
        x = T.match_buffer(x_data, (batch, channels, length), "float32")
        w = T.match_buffer(w_data, (channels, 1, taps), "float32")
        bias = T.match_buffer(b_data, (channels,), "float32")
        past = T.match_buffer(p_data, (batch, channels, back), "float32")
        y = T.match_buffer(y_data, (batch, channels, length), "float32")
        present = T.match_buffer(n_data, (batch, channels, back), "float32")
        with T.sblock("root"):
            T.reads(
                x[0:batch, 0:channels, 0:length],
                w[0:channels, 0:1, 0:taps],
                bias[0:channels],
                past[0:batch, 0:channels, 0:back],
            )
            T.writes(y[0:batch, 0:channels, 0:length], present[0:batch, 0:channels, 0:back])
            for bc in T.parallel(batch * T.int64(channels)):
                acc = T.alloc_buffer((1,), "float32", scope="local")
                b: T.let = bc // channels
                c: T.let = bc % channels
                for t in T.serial(T.min(length, T.int64(back))):  # reaches back into the past
                    acc[0] = bias[c]
                    for j in T.unroll(taps):
                        if t + j < back:
                            acc[0] = acc[0] + w[c, 0, j] * past[b, c, t + j]
                        else:
                            acc[0] = acc[0] + w[c, 0, j] * x[b, c, t + j - back]
                    y[b, c, t] = act(acc[0])
                for t in T.serial(T.max(length - T.int64(back), T.int64(0))):
                    acc[0] = bias[c]
                    for j in T.unroll(taps):
                        acc[0] = acc[0] + w[c, 0, j] * x[b, c, t + j]
                    y[b, c, t + back] = act(acc[0])
                for j in T.unroll(back):
                    if length + j < back:
                        present[b, c, j] = past[b, c, length + j]
                    else:
                        present[b, c, j] = x[b, c, length + j - back]

    return causal_conv_with_state
