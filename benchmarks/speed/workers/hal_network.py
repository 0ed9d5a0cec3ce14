"""hal: a bundle of a model without state."""

from __future__ import annotations

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import hal.runtime.session

    if options["target"].endswith(":tvm"):
        import hal.targets.tvm.program
    else:
        import hal.targets.onnxruntime.backend  # noqa: F401


def _load(options: protocol.Options) -> protocol.Caller:
    import hal

    session = hal.load(options["artifact"]).session(options["target"], threads=options["threads"])
    image = np.load(options["image"])
    return protocol.Caller(lambda: session.run({"images": image}))


if __name__ == "__main__":
    protocol.serve(_bring_in, _load)
