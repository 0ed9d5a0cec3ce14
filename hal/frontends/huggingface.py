"""Hugging Face directories and transformers models, with their own modelling code.

    >>> loaded = from_directory("./some-model")
    >>> loaded.graph.metadata["task"], len(loaded.graph.state)
    ('causal-lm', 4)

The class comes from ``config.architectures``, as transformers itself decides; what the graph's
inputs are follows from the kind of class (causal LM, image classifier, encoder).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers.models.auto import modeling_auto

from hal.errors import ExportError, ModelError, did_you_mean
from hal.frontends import torch_module
from hal.frontends.causal_lm import CausalLM
from hal.frontends.experts import fused_experts
from hal.frontends.float32_files import as_float32
from hal.frontends.recurrence import fused_recurrences
from hal.frontends.source import Loaded
from hal.ir import Graph

_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
)
_DEFAULT_IMAGE_SIZE = 224


def from_directory(path: str | Path) -> Loaded:
    """Load a directory written by ``save_pretrained`` (config.json + safetensors), in float32.

    Raises:
        ModelError: no or broken config.json, unknown architecture, no, missing or damaged weights
            or such that do not fit the config, a damaged tokenizer.
        ExportError: the model cannot be expressed in the IR.
    """
    path = Path(path)
    config = _read_config(path)
    assets = {name: path / name for name in _ASSETS if (path / name).is_file()}
    for file in assets.values():
        _check_asset(file)
    model = _load_weights(path, _architecture(path, config))
    graph = from_pretrained_model(model, image_size=_preprocessor_size(path))
    graph.metadata["chat_template"] = _has_chat_template(path)
    return Loaded(graph, assets, str(path))


def from_pretrained_model(
    model: transformers.PreTrainedModel, *, image_size: tuple[int, int] | None = None
) -> Graph:
    """Export a transformers model that is already in memory; weights are shared, not copied.

    Causal LMs take ``input_ids`` [batch, sequence] and carry their cache; other text models take
    ``input_ids``, ``attention_mask`` and, if they use them, ``token_type_ids``; image models take
    ``pixel_values`` [batch, channels, height, width] of ``image_size`` or the config's size.

    Raises:
        ExportError: the model cannot be expressed in the IR.
    """
    training = model.training
    model.eval()
    try:
        if _is_causal_lm(type(model).__name__):
            graph = _causal_lm(model)
        elif model.main_input_name == "pixel_values":
            graph = _image_model(model, image_size)
        elif model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
            graph = _text_encoder(model)
        else:
            raise ExportError(
                f"{type(model).__name__} is neither a causal LM, a text encoder nor an image model",
                "pass the module with example inputs instead",
            )
    finally:
        model.train(training)
    graph.metadata |= _facts(model)
    return graph


def _causal_lm(model: transformers.PreTrainedModel) -> Graph:
    with _quiet(), fused_experts(model), fused_recurrences(model):
        module = CausalLM(model)
        states = [item.state() for item in module.layout]
        past = [item.example(2, 4) for item in module.layout]
        axes = [item.axes for item in module.layout]
        graph = torch_module.from_module(
            module,
            (torch.ones(2, 3, dtype=torch.int64), past),
            {"input_ids": {0: "batch", 1: "sequence"}, "past": axes},
            input_names=["input_ids", *(s.input for s in states)],
            output_names=["logits", *(s.output for s in states)],
        )
    graph.state = tuple(states)
    graph.graph.name = type(model).__name__
    graph.metadata["task"] = "causal-lm"
    return graph


class _TensorOutputs(torch.nn.Module):
    """A model whose outputs are a dict of its named tensors, hidden states left out."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = self.model(**inputs, return_dict=True)
        return {k: v for k, v in out.items() if isinstance(v, torch.Tensor)}


def _named_export(
    model: transformers.PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    axes: dict[int, str],
) -> Graph:
    with _quiet(), fused_experts(model):
        graph = torch_module.from_module(
            _TensorOutputs(model),
            ({**inputs},),
            {"inputs": dict.fromkeys(inputs, axes)},
            input_names=list(inputs),
        )
    graph.graph.name = type(model).__name__
    return graph


def _text_encoder(model: transformers.PreTrainedModel) -> Graph:
    accepted = inspect.signature(model.forward).parameters
    ids = torch.ones(2, 3, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 2) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    graph = _named_export(model, inputs, {0: "batch", 1: "sequence"})
    graph.metadata["task"] = "encoder"
    return graph


def _image_model(model: transformers.PreTrainedModel, size: tuple[int, int] | None) -> Graph:
    height, width = size or _image_size(model.config)
    channels = getattr(model.config, "num_channels", 3)
    inputs = {"pixel_values": torch.zeros(2, channels, height, width)}
    graph = _named_export(model, inputs, {0: "batch"})
    is_classifier = "ImageClassification" in type(model).__name__
    graph.metadata["task"] = "image-classifier" if is_classifier else "encoder"
    graph.metadata["image_size"] = [height, width]
    return graph


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or _DEFAULT_IMAGE_SIZE
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _facts(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Neutral facts for a runtime, as far as the configs know them."""
    config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)

    def fact(name: str) -> Any:
        value = getattr(generation, name, None)
        return getattr(config, name, None) if value is None else value

    eos = fact("eos_token_id")
    facts = {
        "architecture": type(model).__name__,
        "eos_token_ids": [] if eos is None else ([eos] if isinstance(eos, int) else list(eos)),
        "bos_token_id": fact("bos_token_id"),
        "pad_token_id": fact("pad_token_id"),
        "vocab_size": getattr(config, "vocab_size", None),
        "max_positions": getattr(config, "max_position_embeddings", None),
    }
    if model.main_input_name == "pixel_values":
        facts = {"architecture": facts["architecture"]}
    if "Classification" in type(model).__name__:
        labels = getattr(model.config, "id2label", None) or {}
        facts["labels"] = {str(k): v for k, v in labels.items()}
    return {k: v for k, v in facts.items() if v is not None}


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not path.is_dir():
        raise ModelError(f"no such directory: {path}", "check the path")
    if not file.is_file():
        raise ModelError(
            f"{path} has no config.json", "a model directory is what save_pretrained writes"
        )
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}", "save the model again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} is not a JSON object", "save the model again")
    return data


def _check_asset(file: Path) -> None:
    """Notice a damaged file now, not when the bundle is first used."""
    if file.suffix == ".json":
        _read_json(file)
    if file.name == "tokenizer.json":
        try:
            tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001  a plain Exception is what it raises
            raise ModelError(
                f"{file} is not a tokenizer: {torch_module.one_line(error)}",
                "the file is damaged or of a newer format; fetch it again",
            ) from None


def _architecture(path: Path, config: dict[str, Any]) -> type[transformers.PreTrainedModel]:
    names = config.get("architectures") or []
    if not names:
        raise ModelError(
            f"{path / 'config.json'} names no architecture",
            'add "architectures": ["<class name>"] as save_pretrained does',
        )
    name = str(names[0])
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        known = [n for n in dir(transformers) if n.startswith(name[:3])]
        hint = f"transformers {transformers.__version__} does not have it; " + (
            "code that ships with a model is not run"
            if "auto_map" in config
            else did_you_mean(name, known)
        )
        raise ModelError(f"unknown architecture {name!r} in {path / 'config.json'}", hint)
    return cls


def _is_causal_lm(name: str) -> bool:
    return name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _load_weights(
    path: Path, cls: type[transformers.PreTrainedModel]
) -> transformers.PreTrainedModel:
    if not list(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        raise ModelError(
            f"{path} has no weights (*.safetensors)",
            "its weights are pickled: save them with save_pretrained, which writes safetensors"
            if pickled
            else "download or save the weights next to config.json",
        )
    try:
        with _quiet():
            config = cls.config_class.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001  each model checks its configuration its own way
        raise ModelError(
            f"{path / 'config.json'} does not configure {cls.__name__}:"
            f" {torch_module.one_line(error)}",
            "correct it, or save the model again",
        ) from None
    try:
        with _quiet(), as_float32(path) as files:
            model, info = cls.from_pretrained(
                files,
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below
            )
    except Exception as error:  # noqa: BLE001  transformers and safetensors raise many types
        raise ModelError(
            f"the weights in {path} cannot be loaded: {torch_module.one_line(error)}",
            "the files are damaged or belong to another config.json; fetch them again",
        ) from None
    unfit = sorted(info["mismatched_keys"])
    if unfit:
        first = ", ".join(
            f"{name!r} is {list(stored)} in the files and {list(wanted)} by the config"
            for name, stored, wanted in unfit[:3]
        )
        more = f" (and {len(unfit) - 3} more)" if len(unfit) > 3 else ""
        raise ModelError(
            f"the weights in {path} do not fit config.json: {first}{more}",
            "the files belong to another config.json; fetch them again",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {path} lack {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            f"they do not belong to the architecture {cls.__name__}",
        )
    return model


def _preprocessor_size(path: Path) -> tuple[int, int] | None:
    """Height and width that the image preprocessor produces, if it says so."""
    try:
        data = json.loads((path / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = data.get("crop_size") if data.get("do_center_crop") else None
    size = size or data.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    try:
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(config.get("chat_template"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice from transformers; errors come as exceptions."""
    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
