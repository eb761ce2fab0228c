# SPDX-License-Identifier: Apache-2.0
"""Multi-token-prediction layers that transformers drops, out of checkpoints as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import prompts, tiny
from transformers import AutoModelForCausalLM

import hf_polyspec
from hf_polyspec.host.mtp import mtp_layers
from hf_polyspec.host.mtp_tensors import named_layers

_NORMS = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[dict[str, Any], int, str, tuple[str, ...]]] = {
    # Settings, the layer that is stored once more, how its tensors are called, and those that are not a layer's.
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
        0,
        "model.mtp_block.0.",
        ("model.mtp_emb_norm.0", "model.mtp_hidden_norm.0", "model.mtp_linear_proj.0"),
    ),
    "qwen3_next": (
        {
            **_EXPERTS,
            "num_experts": 4,
            "head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        1,
        "mtp.layers.0.",
        ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm"),
    ),
    "glm4_moe_lite": (
        {
            **_EXPERTS,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
        1,
        "model.layers.2.",
        tuple(f"model.layers.2.{name}" for name in _NORMS),
    ),
}


def _stored(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint whose prediction layer is a layer of the model's own, behind random parts; returns those."""
    settings, copied, prefix, names = FAMILIES[family]
    tiny(family, **settings).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    own = f"model.layers.{copied}."
    layer = {prefix + name.removeprefix(own): t.clone() for name, t in tensors.items() if name.startswith(own)}
    generator = torch.Generator().manual_seed(1)
    shapes = ((32,), (32,), (32, 64), (32,))
    parts = {
        f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in zip(names, shapes, strict=False)
    }
    save_file({**tensors, **layer, **parts}, folder / "model.safetensors", metadata={"format": "pt"})
    return parts


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_are_found_and_draft(family: str, tmp_path: Path) -> None:
    parts = list(_stored(family, tmp_path).values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    before = model.config.to_dict(), dict(vars(model.config))
    made = mtp_layers(model).model
    found, own = made.layers[0], model.get_decoder().layers[FAMILIES[family][1]]
    norms = [found.enorm.weight, found.hnorm.weight, found.eh_proj.weight, found.post_norm.weight]
    wanted = parts if len(parts) == 4 else [*parts, model.get_decoder().norm.weight]
    assert all(torch.equal(one, other) for one, other in zip(norms, wanted, strict=True))
    pairs = zip(found.mtp_block.parameters(), own.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert made.shared_head is model.lm_head
    assert made.embed_tokens is model.get_input_embeddings()
    greedy = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, **prompts(2)}
    text = hf_polyspec.generate(model, **greedy, assistant_models=["mtp"])
    assert text.sequences.tolist() == model.generate(**greedy).sequences.tolist()
    assert text.polyspec.levels[1].drafted
    assert (model.config.to_dict(), dict(vars(model.config))) == before


def test_what_is_no_such_layer_is_said(tmp_path: Path) -> None:
    """Odd layouts are named, and a layer that does not fit the model's own is refused before anything is written."""
    parts = _stored("qwen3_next", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    asked = {"max_new_tokens": 4, "do_sample": False, **prompts(1)}
    for changed, reason in (
        ({"mtp.fc.weight": None}, r"\(mtp\..* and others\) are of another kind than DeepSeek-V3's"),
        ({"mtp.layers.1.x.weight": parts["mtp.norm.weight"]}, r"\(mtp\..* and others\) are of another kind"),
        ({"mtp.layers.0.self_attn.q_proj.weight": None}, r"could not be loaded .* weights are missing"),
        ({name: None for name in tensors if name.startswith("mtp.")}, r"no tensors of such layers"),
    ):
        kept = {name: tensor for name, tensor in {**tensors, **changed}.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"assistant_models\[0\] is 'mtp', and .*{reason}"):
            hf_polyspec.generate(model, **asked, assistant_models=["mtp"])


def test_names_of_published_checkpoints() -> None:
    deepseek = [f"model.layers.{n}.{name}.weight" for n in (60, 61, 62) for name in (*_NORMS, "mlp.up_proj")]
    found = named_layers([*deepseek, "model.layers.61.embed_tokens.weight"], 61)
    assert [layer["mlp.up_proj.weight"] for layer in found] == [
        f"model.layers.{n}.mlp.up_proj.weight" for n in (61, 62)
    ]
    assert all("embed_tokens.weight" not in layer for layer in found)
    nested = [f"model.mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")]
    assert named_layers(nested, 2)[0]["shared_head.norm.weight"] == "model.mtp.layers.0.final_layernorm.weight"
    apart = [name.replace("mtp.layers", "mtp_layers") for name in nested]
    assert named_layers(apart, 2)[0]["eh_proj.weight"] == "model.mtp_layers.0.eh_proj.weight"
    beside = [f"model.language_model.layers.46.{name}.weight" for name in _NORMS]
    assert len(named_layers([*beside, "model.visual.layers.46.attn.weight"], 46)) == 1
    assert named_layers(["model.layers.2.mlp.up_proj.weight", "model.layers.61.enorm.weight"], 61) == []
