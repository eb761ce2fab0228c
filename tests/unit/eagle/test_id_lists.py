# SPDX-License-Identifier: Apache-2.0
"""Lists of ids are saved as tensors beside the weights, whole or not at all; files with them in JSON still load."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

from hf_polyspec.eagle import EagleHead, EagleHeadConfig

SIZES: dict[str, Any] = {
    "vocab_size": 5000, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "own_lm_head": False,
}  # fmt: skip
RANKED = random.Random(0).sample(range(SIZES["vocab_size"]), 4000)


@pytest.fixture
def head() -> EagleHead:
    torch.manual_seed(0)
    made = EagleHead(EagleHeadConfig(algorithm="eagle3", **SIZES))
    made.config.frequent_tokens = list(RANKED)
    return made


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def in_json(folder: Path, ids: list[int]) -> None:
    """Turns a saved head into one as they were saved before: the ids in config.json, none beside the weights."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("frequent_tokens", None)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(written(folder) | {"frequent_tokens": ids}, indent=2))


def test_ids_are_a_tensor_and_come_back_in_order(head: EagleHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    assert "frequent_tokens" not in written(tmp_path)
    assert (tmp_path / "config.json").stat().st_size < 2000
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["frequent_tokens"].dtype == torch.int32
    assert stored["frequent_tokens"].tolist() == RANKED
    assert EagleHead.from_pretrained(tmp_path).config.frequent_tokens == RANKED


def test_saving_leaves_head_and_config_as_they_were(head: EagleHead, tmp_path: Path) -> None:
    names = set(head.state_dict())
    head.save_pretrained(tmp_path)
    assert head.config.frequent_tokens == RANKED
    assert set(head.state_dict()) == names
    assert head.config.to_dict()["frequent_tokens"] == RANKED


def test_weights_are_bit_for_bit_the_same_with_and_without(head: EagleHead, tmp_path: Path) -> None:
    head.half().save_pretrained(tmp_path / "with")
    head.config.frequent_tokens = None
    head.save_pretrained(tmp_path / "without")
    listed, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert listed.keys() - plain.keys() == {"frequent_tokens"}
    assert all(torch.equal(listed[name].view(torch.int16), plain[name].view(torch.int16)) for name in plain)
    assert EagleHead.from_pretrained(tmp_path / "without").config.frequent_tokens is None


def test_the_old_form_loads_and_is_saved_in_the_new_one(head: EagleHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path / "old")
    in_json(tmp_path / "old", RANKED[:77])
    old = EagleHead.from_pretrained(tmp_path / "old")
    assert old.config.frequent_tokens == RANKED[:77]
    old.save_pretrained(tmp_path / "new")
    assert "frequent_tokens" not in written(tmp_path / "new")
    new = EagleHead.from_pretrained(tmp_path / "new")
    assert new.config.frequent_tokens == RANKED[:77]
    assert all(torch.equal(weight, new.state_dict()[name]) for name, weight in old.state_dict().items())


def test_whoever_knows_better_wins(head: EagleHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    assert EagleHead.from_pretrained(tmp_path, frequent_tokens=[3, 1]).config.frequent_tokens == [3, 1]
    (tmp_path / "config.json").write_text(json.dumps(written(tmp_path) | {"frequent_tokens": [9, 8]}))
    assert EagleHead.from_pretrained(tmp_path).config.frequent_tokens == [9, 8]


def test_auto_classes_know_the_ids(head: EagleHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.frequent_tokens == RANKED
    assert AutoModel.from_pretrained(tmp_path, config=config).config.frequent_tokens == RANKED
    assert config.frequent_tokens is None  # the caller's own is not touched


def test_a_config_that_is_saved_alone_keeps_its_ids(head: EagleHead, tmp_path: Path) -> None:
    head.config.save_pretrained(tmp_path)
    assert EagleHeadConfig.from_pretrained(tmp_path).frequent_tokens == RANKED


@pytest.mark.parametrize(
    "ids", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int32), torch.tensor([4, -1]), torch.tensor([True])]
)
def test_what_is_no_list_of_ids_is_refused(head: EagleHead, tmp_path: Path, ids: torch.Tensor) -> None:
    head.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"frequent_tokens": ids}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'frequent_tokens' in the weights of .* must list ids"):
        EagleHead.from_pretrained(tmp_path)


# -- whole or not at all -------------------------------------------------------------------------------------


def test_a_kill_while_saving_leaves_the_head_that_was_there(
    head: EagleHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    whole = PreTrainedModel.save_pretrained

    def killed(self: Any, place: Any, *args: Any, **kwargs: Any) -> None:
        whole(self, place, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", killed)
    head.config.frequent_tokens = [1]
    with pytest.raises(KeyboardInterrupt):
        head.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shards_of_an_earlier_head_go_and_other_files_stay(head: EagleHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert EagleHead.from_pretrained(tmp_path).config.frequent_tokens == RANKED
    (tmp_path / "notes.txt").write_text("mine")
    head.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    head.save_pretrained(tmp_path, max_shard_size="2KB")
    assert not (tmp_path / "model.safetensors").exists()  # it would be read before the shards


def test_files_follow_the_umask(head: EagleHead, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        head.save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}
