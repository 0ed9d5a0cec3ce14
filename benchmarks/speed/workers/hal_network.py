"""hal: a bundle of a model without state."""

from __future__ import annotations

from typing import Any

import numpy as np
import protocol


def _bring_in(options: protocol.Options) -> None:
    import hal.runtime.session

    if options["target"].endswith(":tvm"):
        import hal.targets.tvm.program
    else:
        import hal.targets.onnxruntime.backend  # noqa: F401


class HalNetwork(protocol.Caller):
    """A session that is called with the same image."""

    def __init__(self, options: protocol.Options) -> None:
        import hal

        bundle = hal.load(options["artifact"])
        self._session = bundle.session(options["target"], threads=options["threads"])
        image = np.load(options["image"])
        super().__init__(lambda: self._session.run({"images": image}))

    @property
    def parts(self) -> list[Any]:
        """What runs the segments of the build, for profiles."""
        return [part for part, _, _ in self._session.executable._parts]


if __name__ == "__main__":
    protocol.serve(_bring_in, HalNetwork)
