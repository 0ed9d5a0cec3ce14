from __future__ import annotations

from pathlib import Path

import pytest

from hal import InputError
from hal.passes.quantize import parse_recipe, parse_setting
from hal.quantization import Plan, plan_of, read_plan


def test_a_plan_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan(
        parse_recipe("w4a16:gptq, head=float"),
        {'a "quoted" layer': parse_setting("w8a16-g64"), "layer.1": None},
    )
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml({"layer.1": "damage 0.3"}))
    assert read_plan(path) == plan
    assert plan_of(str(path)) == plan
    assert "# damage 0.3" in path.read_text()


@pytest.mark.parametrize(
    "text",
    ["recipe = ", "[layers]", 'recipe = "w4a16"\nlayers = 3', 'recipe = "w4a16"\n[layer]\n',
     'recipe = "w5"', 'recipe = "w4a16"\n[layers]\na = 3', 'recipe = "w4a16"\n[layers]\na = "w9"'],
)  # fmt: skip
def test_a_broken_plan_is_an_error_with_a_hint(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_plan(path)
    assert caught.value.hint


def test_a_plan_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.toml"):
        plan_of(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("text", "place"),
    [('recipe = "w5"', "recipe"), ('recipe = "w4a16"\n[layers]\n"a.b" = "w9"', "'a.b'")],
)
def test_an_error_names_the_file_and_the_place(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_plan(path)
    assert str(path) in caught.value.message
    assert place in caught.value.message
