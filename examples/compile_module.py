"""Compile a torch module and call it: python examples/compile_module.py"""

import torch

import hal


class Classifier(torch.nn.Module):
    """Two layers; ``forward`` takes ``pixels`` [batch, 64] and gives probabilities [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Linear(64, 32)
        self.output = torch.nn.Linear(32, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.output(torch.relu(self.hidden(pixels))), dim=-1)


def main() -> None:
    module = Classifier().eval()
    bundle = hal.compile(
        module,
        torch.randn(2, 64),
        dynamic={"pixels": {0: "batch"}},
        output="classifier.hal",
    )
    print(f"{bundle.path} takes {[str(spec) for spec in bundle.session().inputs]}")
    for name, build in bundle.manifest.builds.items():
        print(f"{name}: {build.placement['summary']}")

    x = torch.randn(5, 64)  # another batch size than the example's
    result = bundle.session()(x)
    with torch.no_grad():
        error = abs(result - module(x).numpy()).max()
    print(f"result {result.shape}, largest difference from torch {error:.1e}")


if __name__ == "__main__":
    main()
