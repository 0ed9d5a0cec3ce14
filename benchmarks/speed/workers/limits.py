"""What this machine's memory and units give; the loops are those of ``benchmarks/machine.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def _bring_in(options: protocol.Options) -> None:
    import machine  # noqa: F401


class Limits:
    """``read`` bytes, ``fma`` and ``dot`` operations, in 1e9 a second; the widest vectors."""

    def __init__(self, options: protocol.Options) -> None:
        import machine

        from hal.targets.tvm.program import use_threads

        threads, bits = options["threads"], machine.widths()[-1]
        use_threads(threads)
        self._loops = {
            "read": machine.reading(threads),
            "fma": machine.multiplying(threads, bits),
            "dot": machine.dotting(threads, bits),
        }

    def answer(self, request: protocol.Options) -> protocol.Answer:
        """Rates of one loop.

        Raises:
            ValueError: there is no such loop on this chip.
        """
        loop = self._loops.get(request["do"])
        if loop is None:
            raise ValueError(f"the chip's description has nothing for {request['do']!r}")
        timed = protocol.Caller(loop.call).answer({"do": "calls", "runs": request["runs"]})
        rates = [loop.amount / seconds / 1e9 for seconds in timed["seconds"]]
        return {**timed, "rates": rates}


if __name__ == "__main__":
    protocol.serve(_bring_in, Limits)
