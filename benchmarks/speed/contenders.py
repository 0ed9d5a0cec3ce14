"""Who runs what, in which cell. Formats are those of each runtime that come nearest to each other.

Weights of 4 bits: one scale for 32 of them, the head and the embedding in 4 bits too where a
runtime has that; activations rounded to 8 bits where a runtime does so by itself. 8 bits alike.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from speed.artifacts import Artifact, digest
from speed.cells import Contender, Group, Measure
from speed.shapes import Shape, shapes

ROUTES = ("host:tvm", "host:onnxruntime")
RECIPES = {
    "4-bit": "w4a8-g32,head=w4a8-g32,embedding=w4a16-g32",
    "8-bit": "w8a8-g32",
    "float32": None,
    "bfloat16": None,
}
BITS_PER_WEIGHT = {"4-bit": 4.5, "8-bit": 8.5, "float32": 32.0, "bfloat16": 16.0}
"""With a scale of 16 bits for 32 weights, as hal and llama.cpp store them."""

NETWORKS = ("ResNet-18-like", "MobileNetV2-like")
_NO_TORCH = {
    "4-bit": "PyTorch has 4-bit products as an internal operator only; what puts them into a model "
    "is torchao, a package of its own",
}
_NO_EXPORT = (
    "with transformers 4.53.3 in its environment the export fails as well:"
    " deepseek_v3_attn_forward() got an unexpected keyword argument 'cache_position'"
)
_NOT_VERIFIED = (
    "not verified: with random weights a hair decides which experts a token gets, and rounding"
    " activations to 8 bits is enough"
)
_PLAIN = {"bfloat16": "a module in bfloat16: checkpoints are read as float32, judged here too"}
_LIMIT = Contender("memory: read", "machine", "hal", "limits.py")


def groups(quick: bool) -> list[Group]:
    """All of them, in the order in which they run."""
    llama, qwen, deepseek = shapes(quick).values()
    found = [_machine()]
    for shape in (llama, qwen):
        found += [_language(shape, form, quick) for form in ("4-bit", "8-bit", "float32")]
        found.append(_language(shape, "bfloat16", quick))
    found += [_long(shape, quick) for shape in (llama, qwen)]
    found.append(_deepseek(deepseek, quick))
    found += [_cold(shape, form, quick) for shape in (llama, qwen) for form in ("4-bit", "8-bit")]
    found += [_network(name, form) for name in NETWORKS for form in ("float32", "int8")]
    return found


# -- artifacts --------------------------------------------------------------------------------


def checkpoint(shape: Shape) -> Artifact:
    """Random weights as a Hugging Face folder."""
    return Artifact(
        f"{shape.name}/checkpoint", "checkpoint.py", "hal", (shape.name, "{output}")
    )  # fmt: skip


def bundle(shape: Shape, form: str, route: str, kv_cache: str = "auto") -> Artifact:
    """What ``hal.compile`` makes of a checkpoint."""
    options: dict[str, Any] = {"target": route, "quantize": RECIPES[form], "kv_cache": kv_cache}
    if "n_routed_experts" in shape.config:
        options["verify"] = False
    if form == "bfloat16":
        options["dtype"] = form
    return hal_artifact(shape.name, checkpoint(shape), "", options, form)


def hal_artifact(
    folder: str, source: Artifact, part: str, options: dict[str, Any], form: str
) -> Artifact:
    """A bundle in ``folder`` of the cache, from a part of ``source``."""
    text = json.dumps(options, sort_keys=True)
    route = options["target"].split(":")[1]
    return Artifact(
        f"{folder}/hal-{form}-{route}-{digest(text)}", "hal_bundle.py", "hal",
        ("{source}" + part, "{output}", text), (("source", source),), of_hal=True,
    )  # fmt: skip


def made(shape: Shape, runtime: str, form: str) -> Artifact:
    """A peer's file or folder, by the name of its script."""
    script = {"llama.cpp": "gguf_file.py", "openvino": "openvino_language.py"}.get(
        runtime, "genai_model.py"
    )
    end = ".gguf" if runtime == "llama.cpp" else ""
    return Artifact(
        f"{shape.name}/{runtime}-{form}{end}", script, runtime, ("{source}", "{output}", form),
        (("source", checkpoint(shape)),), folder=not end,
    )  # fmt: skip


# -- contenders -------------------------------------------------------------------------------


def _hal(shape: Shape, form: str, kv_cache: str = "auto") -> Iterator[Contender]:
    note = f"`--quantize {RECIPES[form]}`" if RECIPES[form] else _PLAIN.get(form, "")
    if "n_routed_experts" in shape.config:
        note += f"; {_NOT_VERIFIED}"
    cache = "" if kv_cache == "auto" else f", {kv_cache} cache"
    for route in ROUTES:
        yield Contender(
            f"hal {route}{cache}", "hal", "hal-runtime", "hal_language.py",
            bundle(shape, form, route, kv_cache), (("target", route),), note=note,
        )  # fmt: skip


def _llama(shape: Shape, form: str, room: int, cache: str = "") -> Contender:
    options: list[tuple[str, Any]] = [("room", room)]
    if cache:
        options.append(("cache", cache))
    return Contender(
        f"llama.cpp {form}{f', {cache} cache' if cache else ''}", "peer", "llama.cpp",
        "llama_cpp_language.py", made(shape, "llama.cpp", form), tuple(options),
    )  # fmt: skip


def _openvino(shape: Shape, form: str, precision: str = "") -> Iterator[Contender]:
    hint = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    artifact = made(shape, "openvino", form)
    for name, script in (
        ("OpenVINO", "openvino_language.py"),
        ("OpenVINO GenAI", "openvino_genai_language.py"),
    ):
        title = f"{name} {form}{f' as {precision}' if precision else ''}"
        yield Contender(title, "peer", "openvino", script, artifact, (("properties", hint),))


def _genai(shape: Shape, form: str) -> Contender:
    return Contender(
        f"onnxruntime-genai {form}", "peer", "onnxruntime-genai", "onnxruntime_genai_language.py",
        made(shape, "onnxruntime-genai", form),
    )  # fmt: skip


def _torch(shape: Shape, dtype: str, **options: bool) -> Contender:
    way = "torch.compile" if options.get("compiled") else "PyTorch eager"
    title = f"{way} {'dynamic int8' if options.get('int8') else dtype}"
    return Contender(
        title, "peer", "hal", "torch_language.py", checkpoint(shape),
        (("dtype", dtype), *options.items()),
    )  # fmt: skip


def _peers(shape: Shape, form: str, room: int) -> list[Contender]:
    if form == "4-bit":
        return [
            *(_llama(shape, name, room) for name in ("q4_0-pure", "q4_0", "q4_k_m")),
            *_openvino(shape, "int4"),
            _genai(shape, "int4"),
            Contender("PyTorch", "peer", lacking=_NO_TORCH[form]),
        ]
    if form == "8-bit":
        return [
            _llama(shape, "q8_0", room),
            *_openvino(shape, "int8"),
            _genai(shape, "int8"),
            _torch(shape, "float32", int8=True),
        ]
    if form == "float32":
        return [
            _llama(shape, "f32", room),
            *_openvino(shape, "fp32", "f32"),
            _genai(shape, "fp32"),
            _torch(shape, "float32"),
            _torch(shape, "float32", compiled=True),
        ]
    return [
        _llama(shape, "bf16", room),
        *_openvino(shape, "fp16", "bf16"),
        _genai(shape, "bf16"),
        _torch(shape, "bfloat16"),
        _torch(shape, "bfloat16", compiled=True),
    ]


# -- groups -----------------------------------------------------------------------------------


def _machine() -> Group:
    kinds = (("read", "GB/s"), ("fma", "GFLOP/s"), ("dot", "GOP/s"))
    titles = {
        "read": "reading memory, huge pages",
        "fma": "float32 multiply-add on registers",
        "dot": "dot products of bytes on registers",
    }
    measures = tuple(Measure(k, titles[k], _request(k, runs=5), unit) for k, unit in kinds)
    who = Contender("this machine", "machine", "hal", "limits.py")
    return Group("machine", "llm", "The machine", (who,), measures)


def _language(shape: Shape, form: str, quick: bool) -> Group:
    tokens, prompts = (8, (32, 64)) if quick else (64, (256, 1024))
    context = 16 if quick else 64
    measures = [
        Measure(
            "decode", f"decoding, batch 1, context {context} to {context + tokens}",
            _request("decode", context=context, tokens=tokens, seed=0), "tok/s", limit="read",
        ),
        *(
            Measure(f"prefill-{n}", f"prefill of {n} tokens",
                    _request("prefill", tokens=n, seed=0), "tok/s")
            for n in prompts
        ),
    ]  # fmt: skip
    room = max(prompts) + 256
    return Group(
        f"llm/{shape.name}/{form}", "llm", f"{shape.title}: {form} weights",
        (_LIMIT, *_hal(shape, form), *_peers(shape, form, room)), tuple(measures),
        (("bytes_per_token", bytes_per_token(shape, form)), ("form", form)),
    )  # fmt: skip


def bytes_per_token(shape: Shape, form: str) -> float:
    """Bytes of weights that one token must read in a format."""
    return shape.linear_parameters * BITS_PER_WEIGHT[form] / 8


def _long(shape: Shape, quick: bool) -> Group:
    context, tokens = (256, 4) if quick else (8192, 16)
    room = context + (512 if quick else 2048)
    measure = Measure(
        "decode", f"decoding, batch 1, context {context}", _request("decode", tokens=tokens),
        "tok/s", first=_request("hold", context=context, room=room, seed=0), limit="read",
    )  # fmt: skip
    contenders = (
        _LIMIT,
        *_hal(shape, "4-bit", "int8"),
        *(_llama(shape, "q4_0-pure", room, cache) for cache in ("q8_0", "f16")),
        *_openvino(shape, "int4"),
        _genai(shape, "int4"),
        Contender("PyTorch", "peer", lacking=_NO_TORCH["4-bit"]),
    )
    cache = context * shape.cache_numbers() * (8 + 1) / 8
    facts = (("bytes_per_token", bytes_per_token(shape, "4-bit") + cache), ("form", "4-bit"))
    return Group(
        f"llm/{shape.name}/long", "llm",
        f"{shape.title}: 4-bit weights, context {context}, each with its best cache",
        contenders, (measure,), facts,
    )  # fmt: skip


def _deepseek(shape: Shape, quick: bool) -> Group:
    context, tokens = (16, 4) if quick else (64, 64)
    measure = Measure(
        "decode", f"decoding, batch 1, context {context} to {context + tokens}",
        _request("decode", context=context, tokens=tokens, seed=0), "tok/s", limit="read",
    )  # fmt: skip
    contenders = (
        _LIMIT,
        *_hal(shape, "4-bit"),
        _llama(shape, "q4_0-pure", 1024),
        _llama(shape, "bf16", 1024),
        *(dataclasses.replace(c, note=_NO_EXPORT) for c in _openvino(shape, "int4")),
        _genai(shape, "int4"),
        _torch(shape, "float32"),
        _torch(shape, "bfloat16"),
        _torch(shape, "bfloat16", compiled=True),
    )
    return Group(
        f"llm/{shape.name}/4-bit", "llm", f"{shape.title}: 4-bit weights, peers in any format",
        contenders, (measure,),
        (("bytes_per_token", bytes_per_token(shape, "4-bit")), ("form", "4-bit")),
    )  # fmt: skip


def _cold(shape: Shape, form: str, quick: bool) -> Group:
    tokens = 16 if quick else 64
    measures = (
        Measure("first-token", f"start of the process to the first token after {tokens}",
                _request("prefill", tokens=tokens, seed=0), "s"),
        Measure("peak-memory", f"largest resident set after {tokens} more tokens",
                _request("decode", context=tokens, tokens=tokens, seed=0), "MB"),
    )  # fmt: skip
    cache = 2 * tokens * shape.cache_numbers() * 4
    facts = (("cache_bytes", cache), ("form", form))
    contenders = (*_hal(shape, form), *_peers(shape, form, 1024))
    return Group(
        f"llm/{shape.name}/{form}-cold", "llm", f"{shape.title}: {form} weights, a cold process",
        contenders, measures, facts, cold=True,
    )  # fmt: skip


def _network(name: str, form: str) -> Group:
    source = Artifact(f"{name}/network", "network.py", "hal", (name, "{output}"))

    image = (("image", dataclasses.replace(source, part="image.npy")),)
    options: dict[str, Any] = {"quantize": "w8a8", "calibration": "{source}/calibration.npy"}
    contenders = []
    for route in ROUTES:
        given = {"target": route, **(options if form == "int8" else {})}
        contenders.append(
            Contender(
                f"hal {route}", "hal", "hal", "hal_network.py",
                hal_artifact(name, source, "/model.onnx", given, form),
                (("target", route),), image,
                note="`--quantize w8a8`" if form == "int8" else "float32",
            )
        )  # fmt: skip
    contenders += _network_peers(name, form, source, image)
    measure = Measure("batch-1", "one image of 224 x 224", _request("calls", runs=30), "ms")
    return Group(
        f"cnn/{name}/{form}", "cnn", f"{name}: {form}", tuple(contenders), (measure,),
        (("form", form),),
    )  # fmt: skip


def _network_peers(
    name: str, form: str, source: Artifact, image: tuple[tuple[str, Artifact], ...]
) -> list[Contender]:
    def peer(title: str, script: str, artifact: Artifact, **options: Any) -> Contender:
        environment = artifact.loaded_in or artifact.environment
        given = tuple(options.items())
        return Contender(title, "peer", environment, script, artifact, given, image)

    def within(part: str, environment: str = "hal") -> Artifact:
        return dataclasses.replace(source, part=part, loaded_in=environment)

    if form == "float32":
        onnx, parameters = "model.onnx", within("model.pt")
        return [
            peer("onnxruntime", "onnxruntime_network.py", within(onnx)),
            peer("OpenVINO", "openvino_network.py", within(onnx, "openvino")),
            peer("PyTorch eager, channels last", "torch_network.py", parameters, network=name),
            peer("torch.compile, frozen", "torch_network.py", parameters, network=name,
                 compiled=True),
        ]  # fmt: skip
    nncf = Artifact(
        f"{name}/openvino-int8", "openvino_network.py", "openvino",
        ("{source}/model.onnx", "{output}", "{source}/calibration.npy"), (("source", source),),
        part="model.xml",
    )  # fmt: skip
    return [
        peer("onnxruntime quantize_static", "onnxruntime_network.py", within("quantized.onnx")),
        peer("OpenVINO, NNCF", "openvino_network.py", nncf),
        Contender(
            "PyTorch eager, quantize_fx", "peer", "hal", "torch_network.py", within("model.pt"),
            (("network", name), ("int8", True)),
            (*image, ("calibration", dataclasses.replace(source, part="calibration.npy"))),
        ),
    ]  # fmt: skip


def _request(do: str, **fields: Any) -> tuple[tuple[str, Any], ...]:
    return (("do", do), *fields.items())
