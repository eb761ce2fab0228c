# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that does not add up is refused, and the message names what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_polyspec.eagle import EagleHead

ALWAYS = [
    "fc.weight",
    "midlayer.mlp.down_proj.weight",
    "midlayer.hidden_norm.weight",
    "lm_head.weight",
    "d2t",
]


@pytest.mark.parametrize("missing", [*ALWAYS, "midlayer.post_attention_layernorm.weight"])
def test_missing_key_of_eagle3(kit: SimpleNamespace, tmp_path: Path, missing: str) -> None:
    config, w = kit.eagle3()
    del w[missing]
    if missing == "d2t":
        del w["t2d"]
    name = missing.replace("midlayer.", "layers.0.")
    with pytest.raises(ValueError, match=r"missing|misshapen|wide") as error:
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    assert name in str(error.value) or missing == "d2t"


def test_missing_offsets_are_named_as_a_misfit(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    del w["d2t"], w["t2d"]
    with pytest.raises(ValueError, match="missing keys: d2t"):
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))


@pytest.mark.parametrize("missing", ["fc.weight", "layers.0.mlp.up_proj.weight", "layers.0.self_attn.k_proj.weight"])
def test_missing_key_of_eagle1(kit: SimpleNamespace, tmp_path: Path, missing: str) -> None:
    config, w = kit.eagle1()
    del w[missing]
    with pytest.raises(ValueError, match="missing") as error:
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    assert missing in str(error.value)


def test_all_wrong_keys_are_listed(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    del w["midlayer.mlp.up_proj.weight"], w["midlayer.hidden_norm.weight"]
    w |= {"strange.weight": torch.zeros(2), "midlayer.mlp.gate_proj.weight_scale": torch.zeros(1)}
    with pytest.raises(ValueError, match="does not add up") as error:
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    for name in (
        "layers.0.mlp.up_proj.weight",
        "layers.0.hidden_norm.weight",
        "strange.weight",
        "layers.0.mlp.gate_proj.weight_scale",
    ):
        assert name in str(error.value)


def test_misshapen_weight(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    w["midlayer.mlp.up_proj.weight"] = torch.zeros(3, kit.H)
    with pytest.raises(ValueError, match=r"up_proj.weight is \[3, 24\], should be \[40, 24\]"):
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))


def test_two_keys_for_one_weight(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    w["layers.0.hidden_norm.weight"] = w["midlayer.hidden_norm.weight"].clone()
    with pytest.raises(ValueError, match="mean the same weight"):
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))


def test_absolute_ids_instead_of_offsets(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    w["d2t"] = w["d2t"] + torch.arange(kit.DRAFT)
    with pytest.raises(ValueError, match="does not hold offsets"):
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))


def test_offsets_over_a_whole_vocabulary(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3(draft=False)
    w["d2t"] = torch.ones(kit.V, dtype=torch.int64)
    with pytest.raises(ValueError, match="moves ids"):
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"mask_token_id": 3}, "mask_token_id"),
        ({"mask_hidden": True}, "mask_hidden"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "quantization_config"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step"),
        ({"eagle_config": {"next_layer_regular": False}}, "next_layer_regular"),
        ({"speculators_model_type": "peagle"}, "peagle"),
        ({"speculators_model_type": "dflash"}, "dflash"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
    ],
)
def test_unsupported_variants_are_refused_by_name(
    kit: SimpleNamespace, tmp_path: Path, fields: dict[str, Any], word: str
) -> None:
    config, w = kit.eagle3()
    with pytest.raises(ValueError, match=word):
        EagleHead.from_pretrained(kit.write(tmp_path, config | fields, w))


def test_a_model_that_is_no_head(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, _ = kit.eagle1()
    with pytest.raises(ValueError, match="No EAGLE head"):
        EagleHead.from_pretrained(kit.write(tmp_path, config, {"wte.weight": torch.zeros(3, 3)}))


def test_fc_that_fits_no_whole_number_of_features(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    with pytest.raises(ValueError, match=r"fc.weight reads features 72 wide"):
        EagleHead.from_pretrained(kit.write(tmp_path, config | {"target_hidden_size": 50}, w))


def test_no_config_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config.json"):
        EagleHead.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OSError, match="no weights"):
        EagleHead.from_pretrained(tmp_path)


# -- files -------------------------------------------------------------------------------------------------


def test_pickled_weights_load(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle1(bias=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(w, tmp_path / "pytorch_model.bin")
    head = EagleHead.from_pretrained(tmp_path)
    torch.testing.assert_close(head.fc.bias.data, w["fc.bias"], atol=0, rtol=0)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("must_not_exist"),))


def test_pickled_code_is_not_run(kit: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, w = kit.eagle1()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(w | {"extra": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        EagleHead.from_pretrained(tmp_path)
    assert not (tmp_path / "must_not_exist").exists()


def test_safetensors_go_before_pickles(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle1(bias=True)
    kit.write(tmp_path, config, w)
    torch.save({name: tensor + 1 for name, tensor in w.items()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(EagleHead.from_pretrained(tmp_path).fc.bias.data, w["fc.bias"])
    assert torch.equal(EagleHead.from_pretrained(tmp_path, use_safetensors=False).fc.bias.data, w["fc.bias"] + 1)


def test_variant(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle1(bias=True)
    kit.write(tmp_path, config, w)
    save_file({name: tensor + 1 for name, tensor in w.items()}, tmp_path / "model.fp16.safetensors")
    assert torch.equal(EagleHead.from_pretrained(tmp_path, variant="fp16").fc.bias.data, w["fc.bias"] + 1)
    with pytest.raises(OSError, match=r"model.q.safetensors, model.safetensors.index.q.json"):
        EagleHead.from_pretrained(tmp_path, variant="q")


def test_sharded_weights(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = sorted(w)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: w[name] for name in members}, tmp_path / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(EagleHead.from_pretrained(tmp_path).fc.weight.data, w["fc.weight"])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(OSError, match="00002-of-00002"):
        EagleHead.from_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"fc.weight": "../model.safetensors"}}))
    with pytest.raises(OSError, match="outside"):
        EagleHead.from_pretrained(tmp_path)


def test_subfolder_and_dtype(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    kit.write(tmp_path / "inner", config, w)
    head = EagleHead.from_pretrained(tmp_path, subfolder="inner", dtype=torch.bfloat16)
    assert head.dtype == torch.bfloat16
    assert head.d2t.dtype == torch.int64
    assert torch.equal(head.target_ids(), w["d2t"] + torch.arange(kit.DRAFT))


def test_stored_dtype_is_kept_by_default(kit: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    w = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in w.items()}
    assert EagleHead.from_pretrained(kit.write(tmp_path, config, w)).dtype == torch.float16


def damaged(path: Path, how: str) -> None:
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut off": whole[: len(whole) * 2 // 3], "garbage": b"\x00\xff{" * 40}[how])


@pytest.mark.parametrize("how", ["empty", "cut off", "garbage"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("layout", ["official", "own"])
def test_a_damaged_file_is_named_with_what_to_do(
    kit: SimpleNamespace, tmp_path: Path, name: str, how: str, layout: str
) -> None:
    head = EagleHead.from_pretrained(kit.write(tmp_path / "official", *kit.eagle3()))
    head.save_pretrained(tmp_path / "own")
    damaged(tmp_path / layout / name, how)
    with pytest.raises(ValueError, match="again") as error:
        EagleHead.from_pretrained(tmp_path / layout)
    assert str(tmp_path / layout / name) in str(error.value)


@pytest.mark.parametrize("how", ["empty", "cut off", "garbage"])
def test_damaged_pickles_and_indices_are_named_too(kit: SimpleNamespace, tmp_path: Path, how: str) -> None:
    config, w = kit.eagle1()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(w, tmp_path / "pytorch_model.bin")
    damaged(tmp_path / "pytorch_model.bin", how)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        EagleHead.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.weight": "model-00001-of-00001.safetensors"}}))
    damaged(index, how)
    with pytest.raises(ValueError, match=r"index\.json"):
        EagleHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_an_index_without_a_map_is_named(kit: SimpleNamespace, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(kit.eagle1()[0]))
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        EagleHead.from_pretrained(tmp_path)


def test_a_pickle_of_something_else_is_named(kit: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(kit.eagle1()[0]))
    torch.save([torch.zeros(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*no tensors by name"):
        EagleHead.from_pretrained(tmp_path)
