"""Sessions of builds with static shapes: texts of any length, a step at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import hal
from hal.errors import InputError, UnsupportedError
from tests.language_model import DIMS, NEW, PROMPT, bundle, expected, fixed, tokens

ROUTES = ("onnxruntime", "tvm")


@pytest.fixture(params=ROUTES)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "tvm":
        pytest.importorskip("tvm")
    return fixed(tmp_path, request.param)


@pytest.mark.parametrize("chunk", [1, 4])
def test_greedy_tokens_are_those_of_a_build_with_free_shapes(target: str, chunk: int) -> None:
    built = bundle().retarget(target, dims={**DIMS, "sequence": chunk})
    record = next(iter(built.manifest.builds.values()))
    assert record.step == {"batch": 1, "tokens": chunk, "capacity": 24}
    assert record.verification is not None
    assert record.verification["passed"]
    with built.session() as session:
        assert tuple(tokens(session)) == expected()
        assert tuple(tokens(session)) == expected()  # again, over what was there


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_last_position_that_there_is_room_for_can_be_filled(chunk: int, tmp_path: Path) -> None:
    """A chunk of four that begins at the last position is padded, and the padding has a place."""
    dims = {**DIMS, "sequence": chunk, "past": 13}
    built = bundle().retarget(fixed(tmp_path, "onnxruntime"), dims=dims)
    ids = np.array([[*PROMPT, 5, 6, 8, 10]], np.int64)
    with built.session() as one, bundle().session() as other:
        np.testing.assert_allclose(
            one.run({"input_ids": ids})["logits"],
            other.run({"input_ids": ids})["logits"],
            atol=1e-4,
        )
        assert one.position == 13
        with pytest.raises(InputError, match=r"14 positions are asked for, the build has .* 13"):
            one.run({"input_ids": ids[:, :1]})


def test_a_prompt_that_does_not_fit_is_refused_before_it_runs(tmp_path: Path) -> None:
    built = bundle().retarget(fixed(tmp_path, "onnxruntime"), dims=DIMS)
    with built.session() as session:
        with pytest.raises(InputError, match="prompt has 30 tokens; this build has 24") as caught:
            tokens(session, list(range(3, 33)))
        assert "--dim" in caught.value.hint
        assert session.position == 0
        assert len(tokens(session, PROMPT, 100)) == 24 - len(PROMPT)


def test_state_goes_back_forks_and_moves_between_builds(tmp_path: Path) -> None:
    built = bundle("llama").retarget(fixed(tmp_path, "onnxruntime"), dims=DIMS)
    ids = np.array([PROMPT], np.int64)
    with built.session() as one, bundle("llama").session() as other:
        whole = other.run({"input_ids": ids})["logits"]
        one.run({"input_ids": ids})
        one.trim(4)
        twin = one.fork()
        for session in (one, twin):
            again = session.run({"input_ids": ids[:, 4:]})["logits"]
            np.testing.assert_allclose(again, whole[:, 4:], atol=1e-4)
        other.trim(6)
        one.import_state(other.export_state())
        np.testing.assert_allclose(
            one.run({"input_ids": ids[:, 6:]})["logits"], whole[:, 6:], atol=1e-4
        )


def test_a_batch_runs_together_and_in_no_other_number(tmp_path: Path) -> None:
    built = bundle().retarget(fixed(tmp_path, "onnxruntime"), dims={**DIMS, "batch": 2})
    prompts = [PROMPT, PROMPT[:4]]
    options = {"max_new_tokens": 6, "stop_token_ids": []}
    with built.session() as session, bundle().session() as other:
        found = session.generate_batch(prompts, **options)
        alone = other.generate_batch(prompts, **options)
        assert [c.token_ids for c in found] == [c.token_ids for c in alone]
        session.reset()
        with pytest.raises(InputError, match="runs 2 sequences together"):
            session.run({"input_ids": np.array([PROMPT], np.int64)})


def test_several_prompts_run_one_by_one_on_a_build_of_one_row(tmp_path: Path) -> None:
    built = bundle().retarget(fixed(tmp_path, "onnxruntime"), dims=DIMS)
    with built.session() as session:
        found = session.generate_batch([PROMPT, PROMPT], max_new_tokens=NEW, stop_token_ids=[])
    assert [tuple(c.token_ids) for c in found] == [expected()] * 2


def test_all_dims_are_asked_for_with_their_meaning(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        bundle().retarget(fixed(tmp_path, "onnxruntime"))
    assert caught.value.message == (
        "target 'fixed' takes static shapes only, and the model has the dynamic dims 'batch' "
        "(sequences that run together), 'sequence' (tokens in a step) and 'past' (positions that "
        "the cache holds, prompt and answer)"
    )
    assert caught.value.hint == "give extents: --dim batch=1 --dim sequence=1 --dim past=256"


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"batch": 1}, r"'sequence' \(tokens in a step\) and 'past' .* have no extent"),
        ({**DIMS, "lenght": 3}, "no dynamic dim 'lenght'"),
        ({**DIMS, "past": 300}, "cache of 300 positions is asked for, the model has 256"),
        ({**DIMS, "batch": 0}, "'batch' cannot have the extent 0"),
    ],
)
def test_wrong_extents_are_told(dims: dict[str, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        bundle().retarget(fixed(tmp_path, "onnxruntime"), dims=dims)


def test_what_pads_or_pages_has_no_static_step(tmp_path: Path) -> None:
    target = fixed(tmp_path, "onnxruntime")
    with pytest.raises(UnsupportedError, match="padding would enter this model's state"):
        bundle("qwen3_next").retarget(target, dims={**DIMS, "sequence": 4})
    with pytest.raises(UnsupportedError, match="no paged cache"):
        bundle().retarget(target, dims=DIMS, kv_cache="paged")


def test_another_static_target_gets_the_same_extents(tmp_path: Path) -> None:
    target = fixed(tmp_path, "onnxruntime")
    built = bundle().retarget(target, dims=DIMS).retarget([target, "host:onnxruntime"])
    steps = {name: record.step for name, record in built.manifest.builds.items()}
    assert steps == {
        "fixed:onnxruntime": {"batch": 1, "tokens": 1, "capacity": 24},
        "host:onnxruntime": {"batch": 1, "tokens": 1, "capacity": 24},
    }
    assert all(figures["passed"] for figures in built.verify().values())


def test_a_model_compiled_for_a_static_chip_keeps_its_dims(tmp_path: Path) -> None:
    from tests.models import save

    source = save("llama", tmp_path)
    built = hal.compile(source, target=fixed(tmp_path, "onnxruntime"), dims=DIMS)
    assert str(built.graph().signature().inputs[0]) == "input_ids: int64[batch, sequence]"
    with built.session() as session:
        assert tuple(tokens(session)) == expected("llama")
    free = built.retarget("host:onnxruntime")
    assert free.manifest.builds["host:onnxruntime"].step is None
