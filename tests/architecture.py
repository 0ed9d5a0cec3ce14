"""The checks behind ``test_architecture.py``: each is a function from source text to findings."""

import ast
import dataclasses
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

FOLDERS = {"hal": "hal", "passes": "hal.passes", "targets": "hal.targets", "kernels": "hal.kernels"}
"""Folder in the repository to the name it is imported as."""

LAYERS = {
    "hal.errors": "errors",
    "hal.ir": "ir",
    "hal.descriptor": "descriptor",
    "hal.frontends": "frontends",
    "hal.passes": "passes",
    "hal.kernels": "kernels",
    "hal.targets": "targets",
    "hal.bundle": "runtime",
    "hal.runtime": "runtime",
    "hal.compiler": "compiler",
    "hal.quantization": "compiler",
    "hal.conformance": "conformance",
    "hal.pytest_plugin": "pytest_plugin",
    "hal.server": "server",
    "hal.cli": "cli",
    "hal": "facade",
}

MAY_IMPORT = {
    "errors": set(),
    "ir": set(),
    "descriptor": set(),
    "frontends": {"ir"},
    "passes": {"ir", "descriptor"},
    "kernels": {"descriptor"},
    "targets": {"ir", "descriptor", "kernels"},
    "runtime": {"ir", "descriptor", "targets"},
    "compiler": {"ir", "descriptor", "frontends", "passes", "targets", "runtime"},
    "server": {"runtime"},
    "conformance": {"ir", "frontends", "passes", "targets", "runtime", "facade"},
    "pytest_plugin": {"targets", "conformance", "facade"},
    "cli": {
        "ir",
        "descriptor",
        "frontends",
        "targets",
        "runtime",
        "compiler",
        "server",
        "conformance",
        "facade",
    },
    "facade": {"compiler", "runtime", "targets"},
}
"""The table of docs/architecture.md; every layer may also import itself and ``hal.errors``."""

EXCEPTIONS = {
    ("hal.bundle.bundle", "hal.compiler"): "Bundle.retarget and .verify hand over to the compiler",
    ("hal.bundle.build", "hal"): "records hal.__version__",
    ("hal.bundle.pieces", "hal"): "records hal.__version__",
    ("hal.frontends.dynamo", "hal.compiler"): "checks options as hal.compile does",
    ("hal.targets.simplify", "hal.passes.fold"): "what legalizing has made constant is folded",
    ("hal.targets.simplify", "hal.passes.cse"): "bodies compute the same again",
    ("hal.targets.simplify", "hal.passes.identity"): "bodies do nothing in special cases",
    ("hal.frontends.dynamo", "hal"): "an entry point: torch.compile calls hal.compile through it",
}
"""Imports against the direction, each with its reason."""

SILICON = re.compile(
    r"""^(
    nvidia|amd|intel|qualcomm|huawei|cambricon|hygon|kunlun(xin)?|iluvatar|enflame|metax|biren
    |rockchip|apple|arm|samsung|mediatek|graviton|jetson|geforce|tesla|xeon|epyc|ryzen|zen\d?
    |cortex|neoverse|snapdragon|hexagon|ascend|mlu|dcu|tpu|esp32|stm32|rk\d+
    |x86|x64|amd64|i[3-6]86|aarch64|armv\d+|riscv\d*|wasm\d*
    |sse\d*|avx\d*|avx512\w*|vnni|amx|neon|sve\d?|rvv|smlad|mve|i8mm|sdot|vpdpbusd\w*|fma3|f16c
    |cuda|cudnn|cublas|rocm|opencl|vulkan|webgpu|ptx|cubin|nvptx|tensorrt|openvino|coreml|qnn|cann
    |sm\d\d+|gfx\d+
    )$""",
    re.VERBOSE,
)
"""Words that name a chip, a vendor, an instruction set or a vendor's software."""

MODELS = re.compile(
    r"""^(
    llama\d*|qwen\d*|gemma\d*|mistral|mixtral|deepseek\w*|phi\d|falcon|bloom|starcoder\d*|olmo\w*
    |bert|roberta|distilbert|minilm|vit|deit|swin|resnet\d*|convnext\w*|mobilenet\w*
    |whisper|t5|bart|gpt2|gptj|gptneox|mamba\d*|rwkv\d*
    )$""",
    re.VERBOSE,
)
"""Words that name a model family."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A rule that a line of source breaks."""

    place: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.place}:{self.line}: {self.text}"


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package: (dotted name, file)."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            yield ".".join(p for p in parts if p != "__init__"), path


def layer_of(module: str) -> str:
    """The layer of a module: that of its longest known prefix."""
    prefix = module
    while prefix not in LAYERS:
        prefix = prefix.rpartition(".")[0]
    return LAYERS[prefix]


def imports(text: str, known: set[str]) -> Iterator[tuple[str, int]]:
    """Modules that source text imports, at any depth: (name, line).

    ``from a import b`` is ``a.b`` when that is in ``known`` and ``a`` otherwise.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in known else node.module), node.lineno


def wrong_directions(module: str, text: str, known: set[str]) -> list[Finding]:
    """Imports that go against the table, and bare imports of our folders."""
    layer, found = layer_of(module), []
    for name, line in imports(text, known):
        if name.split(".")[0] in ("passes", "targets", "kernels"):
            found.append(Finding(module, line, f"imports {name!r} by its bare name"))
        if name != "hal" and not name.startswith("hal."):
            continue
        other = layer_of(name)
        allowed = other in (layer, "errors") or other in MAY_IMPORT[layer]
        if not allowed and (module, name) not in EXCEPTIONS:
            found.append(Finding(module, line, f"{layer} imports {name} ({other})"))
    return found


def private_imports(module: str, text: str, known: set[str]) -> list[Finding]:
    """Imports of another package's private modules."""
    found = []
    for name, line in imports(text, known):
        parts = name.split(".")
        private = next((i for i, part in enumerate(parts) if part.startswith("_")), None)
        if parts[0] == "hal" and private is not None:
            owner = ".".join(parts[:private])
            if module != owner and not module.startswith(owner + "."):
                found.append(Finding(module, line, f"imports the private {name}"))
    return found


def words(text: str) -> set[str]:
    """Lower-case words of an identifier or a sentence; camel case is split."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return {word.lower() for word in re.split(r"[^A-Za-z0-9]+", split) if word}


def named_things(place: str, text: str) -> list[Finding]:
    """Names of chips, vendors, instruction sets and model families in code, strings and comments.

    Allowed: a string of ``hal/cli`` that starts with ``Example:`` (shown by ``--help``).
    """
    found = []
    interesting = (tokenize.NAME, tokenize.STRING, tokenize.COMMENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in interesting and "STRING" not in tokenize.tok_name[token.type]:
            continue
        example = token.string.lstrip("rbfu\"'").startswith("Example:")
        if place.startswith("hal/cli/") and example:
            continue
        for word in sorted(words(token.string)):
            if SILICON.match(word) or MODELS.match(word):
                found.append(Finding(place, token.start[0], f"names {word!r}"))
    return found
