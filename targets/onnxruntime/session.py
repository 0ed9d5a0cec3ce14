"""Loaded models: sessions of the runtime, arrays in and out without copies, carried state."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from hal.descriptor import OnnxRuntimeRoute
from hal.errors import HalError, InputError, TargetError
from hal.ir.ortvalue import as_numpy, from_ort, to_ort
from hal.targets.backend import Executable
from hal.targets.onnxruntime.packing import Repacking

CPU = "CPUExecutionProvider"
NO_REPACKING = "session.disable_prepacking"

_FOLD_LIMIT = 4 << 20
"""Constants larger than this are not folded: a folded weight is a private copy of a mapped one."""


def open_session(
    model: bytes,
    route: OnnxRuntimeRoute,
    *,
    weights: Path,
    threads: int | None,
    prepack: bool,
    fold_bytes: int = 0,
) -> ort.InferenceSession:
    """Make a session on exactly the providers that ``route`` names.

    ``fold_bytes`` allows for larger constants to be computed at load.

    The runtime by itself carries on with the CPU when a provider is missing or fails to start; here
    that is an error.

    Raises:
        TargetError: a provider is missing or cannot start, or the model is refused.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads:
        options.intra_op_num_threads = threads
    entries: dict[str, str] = {
        "session.model_external_initializers_file_folder_path": str(weights),
        "optimization.constant_folding_max_output_size_in_bytes": str(max(_FOLD_LIMIT, fold_bytes)),
    }
    if not prepack:
        entries[NO_REPACKING] = "1"
    if CPU not in route.providers:
        entries["session.disable_cpu_ep_fallback"] = "1"
    entries.update({key: _entry(value) for key, value in route.session_options.items()})
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    _require_providers(route)
    providers = [(name, _options_of(route, name)) for name in route.providers]
    try:
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise TargetError(
            f"onnxruntime cannot load the model: {_sentence(error)}", _package_hint(route)
        ) from error
    absent = [name for name in route.providers if name not in session.get_providers()]
    if absent:
        raise TargetError(f"provider {absent[0]} did not start", _package_hint(route))
    session.disable_fallback()
    return session


def _require_providers(route: OnnxRuntimeRoute) -> None:
    if route.library:
        try:
            module = importlib.import_module(route.library)
            ort.register_execution_provider_library(route.providers[0], module.get_library_path())
        except Exception as error:
            raise TargetError(
                f"provider library {route.library!r} cannot be registered: {_sentence(error)}",
                _package_hint(route),
            ) from error
    known = set(ort.get_available_providers())
    known |= {device.ep_name for device in ort.get_ep_devices()}
    for name in route.providers:
        if name not in known:
            raise TargetError(
                f"onnxruntime {ort.__version__} here has no {name}", _package_hint(route)
            )


def _package_hint(route: OnnxRuntimeRoute) -> str:
    if route.package:
        return f"pip install {route.package}"
    return "`hal targets list` shows what can run here"


def _options_of(route: OnnxRuntimeRoute, name: str) -> dict[str, str]:
    return {key: _entry(value) for key, value in route.provider_options.get(name, {}).items()}


def _entry(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


class OnnxRuntimeExecutable(Executable):
    """One session. Outputs are views of the runtime's memory, and never of an input's."""

    def __init__(
        self,
        session: ort.InferenceSession,
        in_place: Mapping[str, str] | None = None,
        repacking: Repacking | None = None,
    ) -> None:
        self._session: ort.InferenceSession | None = session
        self._in_place = dict(in_place or {})
        self._repacking = repacking
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        both = [*session.get_inputs(), *session.get_outputs()]
        self._plain = all(_is_plain(value.type) for value in both)

    @property
    def session(self) -> ort.InferenceSession:
        """The runtime's session.

        Raises:
            TargetError: the executable was closed.
        """
        if self._session is None:
            raise TargetError("the session is closed", "open a new one: bundle.session()")
        return self._session

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Run once; tensors may be numpy or DLPack, sequences are lists.

        Raises:
            InputError: the runtime refuses an input.
            TargetError: a kernel failed.
        """
        given = {name: inputs[name] for name in self._inputs if name in inputs}
        if self._repacking is not None and self._repacking.due(given):
            self._session = self._repacking.session() or self.session
            self._repacking = None
        if self._plain:
            values = {name: _wrap(name, value) for name, value in given.items()}
            into = {out: values[source] for out, source in self._in_place.items()}
            callers = {value.data_ptr() for value in values.values()}
            results = {
                name: from_ort(value).copy() if value.data_ptr() in callers else from_ort(value)
                for name, value in self._run(values, into).items()
            }
            return {**results, **{out: inputs[source] for out, source in self._in_place.items()}}
        feeds = {name: _plain_feed(value) for name, value in given.items()}
        try:
            results = self.session.run(self._outputs, feeds)
        except HalError:
            raise
        except Exception as error:
            raise _translated(error) from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Release the session and its memory."""
        self._session = self._repacking = None

    def _run(
        self, values: Mapping[str, ort.OrtValue], into: Mapping[str, ort.OrtValue]
    ) -> dict[str, ort.OrtValue]:
        """Run on wrapped tensors; the outputs in ``into`` are written there and not returned."""
        session = self.session
        returned = [name for name in self._outputs if name not in into]
        try:
            if not into:
                results = session.run_with_ort_values(returned, dict(values))
            else:
                binding = session.io_binding()
                for name, value in values.items():
                    binding.bind_ortvalue_input(name, value)
                for name in returned:
                    binding.bind_output(name)
                for name, value in into.items():
                    binding.bind_ortvalue_output(name, value)
                session.run_with_iobinding(binding)
                results = binding.get_outputs()[: len(returned)]
        except Exception as error:
            raise _translated(error) from error
        return dict(zip(returned, results, strict=True))


def _wrap(name: str, value: Any) -> ort.OrtValue:
    try:
        return to_ort(value)
    except TypeError as error:
        raise InputError(f"input {name!r}: {error}", "pass a numpy array") from error


def _is_plain(kind: str) -> bool:
    return kind.startswith("tensor(") and "string" not in kind


def _plain_feed(value: Any) -> Any:
    if value is None or isinstance(value, dict):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain_feed(item) for item in value]
    return as_numpy(value)


def _translated(error: Exception) -> HalError:
    """One sentence from the runtime's exception; wrong arguments are the caller's mistake."""
    if type(error).__name__ in ("InvalidArgument", "ValueError", "TypeError"):
        return InputError(f"onnxruntime refuses the input: {_sentence(error)}", "check the shapes")
    return TargetError(
        f"onnxruntime failed: {_sentence(error)}", "verify the bundle: hal verify BUNDLE"
    )


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text.rsplit("[ONNXRuntimeError] : ", 1)[-1].split(" : ", 2)[-1].rstrip(".")
