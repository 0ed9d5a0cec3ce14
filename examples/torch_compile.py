"""hal as a backend of torch.compile: python examples/torch_compile.py"""

import torch


def main() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    ).eval()
    compiled = torch.compile(model, backend="hal", options={"target": "host"})
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        error = (compiled(images) - model(images)).abs().max()
    print(f"largest difference from torch: {error:.1e}")


if __name__ == "__main__":
    main()
