import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hal.frontends import float32_files
from hal.frontends.float32_files import as_float32


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(8, 4, generator=generator).bfloat16(),
        "b": torch.randn(3, generator=generator).half(),
        "c": torch.randn(5, generator=generator),
        "ids": torch.arange(4),
    }


def everything(folder: Path) -> dict[str, torch.Tensor]:
    named = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in named.items():
        with safe_open(folder / file, "pt") as opened:
            found[name] = opened.get_tensor(name)
    return found


def test_narrow_weights_become_float32_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_files, "_SHARD_BYTES", 100)
    save_file(tensors(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with as_float32(tmp_path) as folder:
        found = everything(folder)
        assert (folder / "config.json").read_text() == "{}"
        assert len(list(folder.glob("*.safetensors"))) == 2
    assert not folder.exists()
    assert {n: t.dtype for n, t in found.items()} == {
        "a": torch.float32, "b": torch.float32, "c": torch.float32, "ids": torch.int64,
    }  # fmt: skip
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert set(load_file(tmp_path / "model.safetensors")) == set(tensors())


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).bfloat16()}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"a": torch.full((2,), 9.0)}, tmp_path / "consolidated.safetensors")
    where = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    with as_float32(tmp_path) as folder:
        found = everything(folder)
    assert set(found) == {"a", "b"}
    assert torch.equal(found["a"], torch.ones(2))


def test_float32_stays_where_it_is(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with as_float32(tmp_path) as folder:
        assert folder == tmp_path
