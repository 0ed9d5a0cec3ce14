"""The rules of docs/architecture.md, kept by tests; each rule is also shown to bite."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hal
from tests.architecture import (
    EXCEPTIONS,
    FOLDERS,
    ROOT,
    named_things,
    private_imports,
    sources,
    words,
    wrong_directions,
)

SOURCES = dict(sources())
KNOWN = set(SOURCES)
NEUTRAL = [path for path in SOURCES.values() if path.relative_to(ROOT).parts[0] != "targets"]
MAX_LINES = 500


def show(findings: object) -> str:
    return "\n".join(map(str, findings))  # type: ignore[call-overload]


# -- import direction -------------------------------------------------------------------------


def test_imports_go_in_one_direction() -> None:
    findings = [
        f for name, path in SOURCES.items() for f in wrong_directions(name, path.read_text(), KNOWN)
    ]
    assert not findings, show(findings)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("hal.ir.graph", "import hal.passes"),
        ("hal.ir.graph", "from hal.descriptor import Descriptor"),
        ("hal.descriptor._model", "from hal import targets"),
        ("hal.frontends.onnx_file", "from hal.passes import Fold"),
        ("hal.passes.fold", "def f():\n    from hal.targets import resolve"),
        ("hal.kernels.matmul", "import hal.ir"),
        ("hal.targets.registry", "import hal.runtime.session"),
        ("hal.runtime.session", "from hal.compiler import compile"),
        ("hal.compiler", "from hal.cli import main"),
        ("hal.passes.fold", "import passes.fuse"),
        ("hal.cli._run", "from targets import resolve"),
    ],
)
def test_the_direction_check_bites(module: str, text: str) -> None:
    assert wrong_directions(module, text, KNOWN)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("hal.passes.fold", "from hal.ir import Graph\nfrom hal.descriptor import Descriptor"),
        ("hal.targets.registry", "from hal.errors import TargetError"),
        ("hal.cli._run", "import hal\nimport numpy"),
    ],
)
def test_the_direction_check_lets_the_right_ones_pass(module: str, text: str) -> None:
    assert not wrong_directions(module, text, KNOWN)


def test_every_exception_is_still_needed() -> None:
    for (module, name), _ in EXCEPTIONS.items():
        if module not in SOURCES:
            continue
        text = SOURCES[module].read_text()
        assert f"import {name}" in text or f"from {name} import" in text, (module, name)


def test_private_modules_stay_private() -> None:
    findings = [
        f for name, path in SOURCES.items() for f in private_imports(name, path.read_text(), KNOWN)
    ]
    assert not findings, show(findings)


def test_the_private_check_bites() -> None:
    assert private_imports("hal.cli._run", "from hal.descriptor._model import Descriptor", KNOWN)
    assert not private_imports("hal.descriptor._parse", "import hal.descriptor._model", KNOWN)


# -- neutrality -------------------------------------------------------------------------------


def test_the_core_names_no_chip_vendor_instruction_set_or_model_family() -> None:
    findings = [
        finding
        for path in NEUTRAL
        for finding in named_things(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not findings, show(findings)


@pytest.mark.parametrize(
    "text",
    [
        "if target.vendor == 'nvidia': pass",
        "use_avx512 = True",
        "class LlamaAttention: pass",
        "model_type = 'deepseek_v3'",
        "x = f'{kind} on x86'",
        "# faster on arm",
        'def f():\n    """For Intel chips."""',
        "torch.cuda.synchronize()",
        'EXAMPLE = "Example: --target x86-64-v3"',
    ],
)
def test_the_neutrality_check_bites(text: str) -> None:
    assert named_things("passes/snippet.py", text)


def test_only_examples_of_the_command_line_may_name_a_chip() -> None:
    assert not named_things("hal/cli/_run.py", 'EXAMPLE = "Example: hal run --target x86-64-v3"')
    assert named_things("hal/cli/_run.py", 'TEXT = "hal run --target x86-64-v3"')


def test_runtimes_and_ordinary_words_are_no_chips() -> None:
    text = "import onnxruntime, tvm\nalarm = 'an armful of intelligence'  # ascending order"
    assert not named_things("passes/snippet.py", text)
    assert words("useAVX512Dot_product") == {"use", "avx512", "dot", "product"}


# -- packaging --------------------------------------------------------------------------------


def test_every_folder_with_code_is_packaged() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    code = {
        ".".join([FOLDERS[top], *path.parent.relative_to(ROOT / top).parts])
        for top in FOLDERS
        for path in (ROOT / top).rglob("*.py")
    }
    assert set(table["packages"]) == code | {"hal.demo_model"}


def test_our_folders_cannot_be_imported_by_their_bare_names(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; "
        "sys.exit(sum(importlib.util.find_spec(n) is not None "
        "for n in ('passes', 'targets', 'kernels')))"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=False)
    assert result.returncode == 0


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    folders = ("tests", "examples", "benchmarks")
    others = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    files = [*SOURCES.values(), *others]
    assert not {str(p.relative_to(ROOT)): n for p in files if (n := lines(p)) > MAX_LINES}


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


# -- public interface -------------------------------------------------------------------------

PUBLIC = [
    "Bundle",
    "BundleError",
    "CheckFailed",
    "DescriptorError",
    "ExportError",
    "GraphError",
    "HalError",
    "InputError",
    "MissingExtraError",
    "ModelError",
    "SavedState",
    "Session",
    "TargetError",
    "UnsupportedError",
    "compile",
    "evaluate",
    "list_targets",
    "load",
]


def test_the_public_names_are_these_and_all_exist() -> None:
    assert sorted(hal.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(hal, name) is not None


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        (
            "compile",
            "model inputs target output dynamic quantize kv_cache verify fallback",
        ),
        ("load", "path"),
        ("list_targets", ""),
        ("Bundle.session", "self target"),
        ("Bundle.retarget", "self target output"),
        ("Bundle.verify", "self target against"),
        ("Session.run", "self inputs"),
        ("Session.generate", "self prompt"),
    ],
)
def test_signatures_keep_their_parameters(path: str, parameters: str) -> None:
    value: object = hal
    for part in path.split("."):
        value = getattr(value, part)
    assert callable(value)
    names = list(inspect.signature(value).parameters)
    wanted = parameters.split()
    assert [n for n in names if n in wanted] == wanted


def test_hal_targets_is_the_package_and_not_a_function() -> None:
    import hal.targets

    assert inspect.ismodule(hal.targets)


def test_importing_hal_and_its_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, hal, hal.cli; "
        "print(' '.join({'torch', 'transformers', 'tvm', 'onnxruntime', 'onnx', 'onnx_ir', 'numpy', "
        "'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
