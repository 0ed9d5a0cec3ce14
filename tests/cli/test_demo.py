import pytest

from tests.cli.conftest import Hal


@pytest.mark.slow
def test_the_demo_shows_both_routes_agreeing_and_moves_the_bundle(hal_command: Hal) -> None:
    result = hal_command("demo", "--max-new-tokens", 12, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report["identical_tokens"] is True
    assert list(report["token_ids"]) == ["host:onnxruntime", "host:tvm"]
    assert report["retargeted"]["token_ids"] == report["token_ids"]["host:onnxruntime"]
    assert report["passes"]
