"""The worker's side: holds one session of an ONNX Runtime that has a vendor's execution provider.

It runs as a plain file in an environment of its own, with ONNX Runtime and NumPy and without hal.
What it is told comes on stdin, what it answers goes to stdout; see ``wire.py`` and
``serving.py``. Everything that
vendors' libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import serving  # type: ignore[import-not-found]

CPU = "CPUExecutionProvider"


class Server:
    """Answers requests with the provider that the first request, ``open``, names."""

    def __init__(self) -> None:
        import onnxruntime

        self.ort = onnxruntime
        self.provider = ""
        self.options: dict[str, str] = {}
        self.entries: dict[str, str] = {}
        self.devices: list[Any] = []
        self.session: Any = None

    def open(self, head: dict[str, Any], _arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Register the provider."""
        self.provider, library = head["provider"], head.get("library")
        folder = ""
        if library:
            path = importlib.import_module(library).get_library_path()
            folder = str(Path(path).parent)
            self.ort.register_execution_provider_library(self.provider, path)
            found = self.ort.get_ep_devices()
            self.devices = [d for d in found if d.ep_name == self.provider]
            if not self.devices:
                raise RuntimeError(f"{library} finds no device for {self.provider}")
        elif self.provider not in self.ort.get_available_providers():
            raise RuntimeError(f"onnxruntime {self.ort.__version__} here has no {self.provider}")
        filled = {k: str(v).replace("{library}", folder) for k, v in head["options"].items()}
        self.options, self.entries = filled, dict(head["entries"])
        return {}

    def reads(self, _head: dict[str, Any], models: dict[str, np.ndarray]) -> dict[str, Any]:
        """Which of the models, named by their operator sets, this runtime still reads."""
        options = self.ort.SessionOptions()
        options.log_severity_level = 4
        found = []
        for opset, model in models.items():
            try:
                self.ort.InferenceSession(model.tobytes(), options, providers=[CPU])
            except Exception:  # noqa: BLE001 - it does not read this one
                continue
            found.append(int(opset))
        return {"version": self.ort.__version__, "reads": found}

    def assign(self, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Names of the nodes that are left for the CPU when the provider may choose.

        They are read from the runtime's log: its reports of assignments leave out providers that
        run nodes one by one. Layouts are changed at every level, so nothing else is optimized.
        """
        options = self._options(head, alone=False)
        options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 0
        with serving.printed() as log:
            self._session(arrays["model"], options)
        text = log[0]
        whole = re.search(r"All nodes placed on \[(\w+)\]", text)
        if whole:
            return {"all": whole[1] == CPU, "nodes": []}
        return {"all": False, **placed(text)}

    def compile(self, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Write a model whose nodes are the provider's finished programs."""
        flags = self.ort.OrtCompileApiFlags.ERROR_IF_NO_NODES_COMPILED
        compiler = self.ort.ModelCompiler(
            self._options(head, alone=False), arrays["model"].tobytes(),
            embed_compiled_data_into_model=True, flags=flags,
        )  # fmt: skip
        compiler.compile_to_file(head["output"])
        return {}

    def load(self, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Make the session that ``run`` uses; none of its nodes may be left for the CPU.

        What the runtime's optimizer makes of the nodes may be left for it: then the nodes are
        taken as they were assigned.
        """
        try:
            self.session = self._session(arrays["model"], self._options(head, alone=True))
        except Exception:  # noqa: BLE001 - the second try tells what is wrong
            options = self._options(head, alone=True)
            options.graph_optimization_level = self.ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            self.session = self._session(arrays["model"], options)
        return {"providers": self.session.get_providers()}

    def run(
        self, head: dict[str, Any], arrays: dict[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Run the session once."""
        results = self.session.run(head["outputs"], arrays)
        return {}, dict(zip(head["outputs"], results, strict=True))

    def _options(self, head: dict[str, Any], *, alone: bool) -> Any:
        options = self.ort.SessionOptions()
        options.log_severity_level = 4
        if head.get("threads"):
            options.intra_op_num_threads = head["threads"]
        entries = dict(self.entries)
        if head.get("weights"):
            entries["session.model_external_initializers_file_folder_path"] = head["weights"]
        if alone:
            entries["session.disable_cpu_ep_fallback"] = "1"
        for key, value in entries.items():
            options.add_session_config_entry(key, str(value))
        if self.devices:
            options.add_provider_for_devices(self.devices[:1], self.options)
        return options

    def _session(self, model: np.ndarray, options: Any) -> Any:
        data = model.tobytes()
        if self.devices:
            return self.ort.InferenceSession(data, options)
        providers = [(self.provider, self.options)]
        session = self.ort.InferenceSession(data, options, providers=providers, enable_fallback=0)
        if self.provider not in session.get_providers():
            raise RuntimeError(f"{self.provider} did not start")
        return session


def placed(log: str) -> dict[str, list[str]]:
    """What a log says: ``nodes`` left for the CPU, and those that the runtime ``rewritten``.

    A rewritten node has the name of the old one and a number; it may be anyone's.
    """
    left, rewritten, on_cpu = [], [], False
    for line in log.splitlines():
        place = re.search(r"Node\(s\) placed on \[(\w+)\]", line)
        if place:
            on_cpu = place[1] == CPU
        elif node := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+\w+ \((.*)\)", line):
            if on_cpu:
                left.append(node[1])
            if copy := re.fullmatch(r"(.+)_token_\d+", node[1]):
                rewritten.append(copy[1])
    if not left:
        raise RuntimeError("the runtime does not say where it placed the nodes")
    return {"nodes": left, "rewritten": rewritten}


if __name__ == "__main__":
    serving.serve(Server)
