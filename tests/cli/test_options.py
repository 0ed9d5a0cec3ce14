import pytest
from hypothesis import given
from hypothesis import strategies as st

from hal.cli._options import InputSpec, dynamic_of, parse_dims, parse_dynamic, parse_input
from hal.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:float32:1,3,224,224", InputSpec("x", "float32", (1, 3, 224, 224))),
        ("x:float32:1x3x224x224", InputSpec("x", "float32", (1, 3, 224, 224))),
        ("ids:int64:batch,sequence", InputSpec("ids", "int64", ("batch", "sequence"))),
        ("a:b:bool:", InputSpec("a:b", "bool", ())),
    ],
)
def test_an_input_option_is_read(text: str, expected: InputSpec) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "--input 'x' is not name:dtype:dims"),
        ("x:float23:1", "--input 'x:float23:1': unknown dtype 'float23'"),
        ("x:float32:-1", "--input 'x:float32:-1': '-1' is neither an extent nor a symbol"),
    ],
)
def test_a_wrong_input_option_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_input(text)
    assert caught.value.message == message
    assert caught.value.hint


@given(
    st.text(st.characters(categories=["Ll", "Nd"], include_characters="._/:"), min_size=1),
    st.lists(st.integers(0, 4096), min_size=1, max_size=5),
)
def test_any_name_and_dims_survive(name: str, dims: list[int]) -> None:
    text = f"{name}:float16:{','.join(map(str, dims))}"
    assert parse_input(text) == InputSpec(name, "float16", tuple(dims))


def test_dynamic_options_are_gathered_by_name() -> None:
    assert parse_dynamic(["x:0=batch", "x:2=height", "a:b:1=n"]) == {
        "x": {0: "batch", 2: "height"},
        "a:b": {1: "n"},
    }
    assert dynamic_of([parse_input("x:int64:batch,3")]) == {"x": {0: "batch"}}


@pytest.mark.parametrize("text", ["x", "x:0", "x:a=b", "x:0=3"])
def test_a_wrong_dynamic_option_is_named(text: str) -> None:
    with pytest.raises(InputError, match="is not name:axis=symbol"):
        parse_dynamic([text])


@pytest.mark.parametrize("text", ["batch", "batch=0", "=3", "batch=x"])
def test_a_wrong_dim_option_is_named(text: str) -> None:
    with pytest.raises(InputError, match="is not name=extent"):
        parse_dims([text])
