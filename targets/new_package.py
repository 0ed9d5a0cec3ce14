"""Writing a package that makes a chip known, for its vendor to begin with."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import jinja2

from hal.errors import InputError

ROUTES = ("custom", "onnxruntime", "tvm")


def write_package(name: str, vendor: str, route: str, folder: Path) -> list[Path]:
    """Write a package for the target ``name`` into ``folder``, which must not exist; its files.

    ``route``: ``custom`` for a backend of its own, or the built-in one that reaches the chip.

    Raises:
        InputError: the name is no target's name, the route is not known, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise InputError(
            f"{name!r} is no name for a new target",
            "lower-case letters, digits and hyphens, for example my-chip",
        )
    if route not in ROUTES:
        raise InputError(f"there is no route {route!r}", f"one of {', '.join(ROUTES)}")
    if not vendor.strip() or '"' in vendor:
        raise InputError(f"{vendor!r} is no vendor's name", "for example --vendor Acme")
    if folder.exists():
        raise InputError(f"{folder} exists already", "choose another folder with --output")
    module = name.replace("-", "_")
    words = {
        "name": name, "vendor": vendor.strip(), "route": route, "module": module,
        "package": f"hal-{name}", "class_name": f"{module.title().replace('_', '')}Backend",
    }  # fmt: skip
    places = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "descriptor.toml": f"{module}/{name}.toml",
        "test_target.py": "tests/test_target.py",
    }
    if route == "custom":
        places["backend.py"] = f"{module}/backend.py"
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    written = []
    for template, place in places.items():
        text = (files("hal.targets") / "template" / f"{template}.j2").read_text()
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(environment.from_string(text).render(words))
        written.append(path)
    start = folder / module / "__init__.py"
    start.write_text(f'"""{name} of {vendor.strip()} as a target of hal."""\n')
    return [*written, start]
