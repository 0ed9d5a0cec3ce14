"""Complex arithmetic exports as real arithmetic that gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hal import ExportError
from hal.frontends import torch_module
from tests.frontends.reference import run, session


class Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def turn(x: torch.Tensor) -> torch.Tensor:
    """[n, 4, 2] → complex [n, 4]."""
    return torch.view_as_complex(x)


def rotary(x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(x.shape[0])[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125])
    rotation = torch.polar(torch.ones_like(angles), angles).unsqueeze(0) * 0.9
    return torch.view_as_real(turn(x).unsqueeze(0) * rotation).flatten(2)


def structure(x: torch.Tensor) -> torch.Tensor:
    z = turn(x)
    parts = [z.T.reshape(2, 2, -1).permute(2, -2, 0), z[:, None, 1:3].expand(-1, 2, 2)]
    joined = torch.cat(parts, dim=-1).transpose(-1, 1).contiguous()
    return torch.view_as_real(joined.sum(-1) + joined.mean(dim=(1,), keepdim=True)[:, 0, :1])


def arithmetic(x: torch.Tensor) -> torch.Tensor:
    z = turn(x)
    w = (z * (1.5 - 2j) + x[..., 0]) / (z.conj() + 3) - z / 2.0 - 1j * torch.exp(0.1 * z)
    return torch.view_as_real(2.0 - w.reciprocal())


def parts(x: torch.Tensor) -> torch.Tensor:
    z = turn(x)
    w = torch.complex(z.imag, z.abs()) @ z.T.conj()
    return w.real + torch.angle(w) + torch.where(w.real > 0, w, w.conj()).imag


@pytest.mark.parametrize("function", [rotary, structure, arithmetic, parts])
def test_complex_functions_equal_torch(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph = torch_module.from_module(Function(function), torch.randn(3, 4, 2), {"x": {0: "n"}})
    sess = session(graph)
    for n in (3, 1, 6):
        x = torch.randn(n, 4, 2)
        np.testing.assert_allclose(run(sess, {"x": x})["output"], function(x), atol=2e-5)


def test_complex_buffers_become_pairs() -> None:
    class Buffered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rotation", torch.polar(torch.ones(4), torch.arange(4.0)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(turn(x) * self.rotation)

    x = torch.randn(3, 4, 2)
    graph = torch_module.from_module(Buffered(), x)
    np.testing.assert_allclose(run(session(graph), {"x": x})["output"], Buffered()(x), atol=1e-6)


def test_an_operator_without_a_rule_is_named() -> None:
    def inverse(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.linalg.inv(turn(x)))

    with pytest.raises(ExportError, match=r"torch operator .*inv.* on complex numbers"):
        torch_module.from_module(Function(inverse), torch.randn(4, 4, 2))
