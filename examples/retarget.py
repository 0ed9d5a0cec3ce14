"""Move a bundle to other targets and compare: python examples/retarget.py BUNDLE [TARGET...]

Nothing of the model's code is needed, and neither is torch.
"""

import sys

import numpy as np

import hal
from hal.runtime.samples import sample_inputs


def main() -> None:
    bundle = hal.load(sys.argv[1])
    targets = sys.argv[2:] or ["x86-64:onnxruntime", "x86-64-v3:onnxruntime"]
    other = bundle.retarget(targets, output="other.hal")
    results = {}
    for opened, target in [(bundle, None), *((other, name) for name in other.targets)]:
        with opened.session(target) as session:
            inputs = sample_inputs(session.inputs, seed=0, metadata=bundle.manifest.metadata)
            results[session.target] = session.run(inputs)
    (first, expected), *rest = results.items()
    for name, actual in rest:
        for output, array in expected.items():
            error = np.abs(actual[output] - array).max()
            print(f"{output} on {name}: largest difference from {first} is {error:.1e}")


if __name__ == "__main__":
    main()
