import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hal.descriptor import UNITS, Quantity


def quantity(value: float, unit: str, **more: object) -> Quantity:
    return Quantity.model_validate(
        {"value": value, "unit": unit, "source": "test", "confidence": "measured", **more}
    )


@pytest.mark.parametrize(
    ("value", "unit"),
    [(1e30, "GiB"), (192e9, "TB"), (8e12, "TB/s"), (2e15, "Tflop/s"), (3.2e9, "GHz"), (700, "PW")],
)
def test_a_figure_beyond_anything_is_refused(value: float, unit: str) -> None:
    with pytest.raises(ValidationError, match="more than any device has: is the unit right"):
        Quantity(value=value, unit=unit, source="s", confidence="vendor")


@pytest.mark.parametrize(
    ("value", "unit", "dimension", "base"),
    [
        (24, "GiB", "bytes", 24 * 2**30),
        (4800.0, "GB/s", "bytes per second", 4.8e12),
        (989, "Tflop/s", "operations per second", 9.89e14),
        (64, "flop/cycle/core", "operations per cycle and core", 64),
        (3.6, "GHz", "frequency", 3.6e9),
        (25, "mW", "power", 0.025),
        (2.95, "USD/h", "price per hour", 2.95),
    ],
)
def test_a_quantity_knows_its_dimension_and_its_base_unit(
    value: float, unit: str, dimension: str, base: float
) -> None:
    assert quantity(value, unit).dimension == dimension
    assert quantity(value, unit).base == pytest.approx(base)


@given(st.sampled_from(sorted(UNITS)), st.floats(0, 1))
def test_conversion_to_the_base_unit_is_linear(unit: str, value: float) -> None:
    one = quantity(1e-6, unit).base
    assert quantity(value * 1e-6, unit).base == pytest.approx(value * one)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_negative_or_infinite_figure_is_refused(value: float) -> None:
    with pytest.raises(ValidationError, match="finite and not negative"):
        quantity(value, "B")


def test_a_figure_without_source_is_refused() -> None:
    with pytest.raises(ValidationError, match="source"):
        quantity(1.0, "B", source="")


def test_alternatives_must_measure_the_same_thing() -> None:
    other = {"value": 1, "unit": "W", "source": "x", "confidence": "vendor"}
    with pytest.raises(ValidationError, match="alternative in 'W' is not bytes"):
        quantity(1.0, "B", alternatives=[other])
