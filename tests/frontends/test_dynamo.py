"""torch.compile(..., backend="hal")."""

from __future__ import annotations

import pytest
import torch

import hal


class Net(torch.nn.Module):
    """Weights, buffers, and a shape that is used as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.norm(self.linear(x)).relu()
        return {"z": z, "sum": z.sum(-1) + x.shape[0]}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_a_compiled_module_equals_eager_at_changing_sizes_and_weights() -> None:
    net = Net().eval()
    compiled = torch.compile(net, backend="hal", options={"verify": False})
    for rows in (3, 5, 8):  # static first, then dynamic
        x = torch.randn(rows, 4)
        got, want = compiled(x), net(x)
        torch.testing.assert_close(got["z"], want["z"].detach())
        torch.testing.assert_close(got["sum"], want["sum"].detach())
    with torch.no_grad():
        net.linear.weight.add_(1)
    torch.testing.assert_close(compiled(x)["z"], net(x)["z"].detach())


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"target": "typo"}, "unknown target 'typo'", "known: "),
        ({"target": 5}, "target=5 is neither", "host"),
        ({"quantize": "w5a16"}, "no weight format 'w5a16'", "as in w4a16"),
        ({"fallbakc": True}, "has no option 'fallbakc'", "did you mean 'fallback'?"),
        ({"output": "x.hal"}, "has no option 'output'", "known: fallback"),
    ],
    ids=str,
)
def test_wrong_options_are_an_error_and_no_warning(
    options: dict[str, object], message: str, hint: str
) -> None:
    compiled = torch.compile(torch.nn.ReLU(), backend="hal", options=options)
    with pytest.raises(hal.HalError, match=message) as caught:
        compiled(torch.ones(2))
    assert hint in caught.value.hint


def test_a_graph_that_cannot_be_compiled_runs_in_torch_with_a_warning() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x)[1]

    x = torch.randn(3, 3)
    compiled = torch.compile(function, backend="hal")
    with pytest.warns(RuntimeWarning, match=r"runs in torch: .*linalg_qr"):
        torch.testing.assert_close(compiled(x), function(x))
