# SPDX-License-Identifier: Apache-2.0
"""Every published layout loads and computes what the formulas say, step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_polyspec.eagle import EagleHead

STEPS = 4
TOLERANCE = 2e-5


@torch.no_grad()
def head_draft(head: EagleHead, tokens: list[int], features: torch.Tensor, steps: int) -> tuple[Any, list[int]]:
    """Prefills in two chunks, then drafts greedily with the cache: (all logits [T + steps, Vd], tokens)."""
    cache, tokens, collected, y = head.new_cache(), list(tokens), [], None
    for piece in (slice(0, 2), slice(2, None)):
        fused = head.fuse(features[piece][None])
        y = head.step(torch.tensor([tokens[piece]]), fused, cache=cache)
        collected.append(head.logits(y)[0])
    for step in range(steps + 1):
        tokens.append(int(head.draft_to_target(collected[-1][-1].argmax())))
        if step < steps:
            y = head.step(torch.tensor([tokens[-1:]]), y[:, -1:], torch.tensor([[len(tokens) - 1]]), cache=cache)
            collected.append(head.logits(y)[0])
    return torch.cat(collected), tokens


def compare(head: EagleHead, target: SimpleNamespace, features: torch.Tensor, reference: tuple[Any, list[int]]) -> None:
    logits, tokens = head_draft(head.bind(target.embedding, target.lm_head), target.tokens, features, STEPS)
    assert tokens == reference[1]
    torch.testing.assert_close(logits, reference[0], atol=TOLERANCE, rtol=TOLERANCE)


def known(kit: SimpleNamespace, target: SimpleNamespace, **changes: Any) -> SimpleNamespace:
    return kit.facts(embedding=target.embedding.weight, lm_head=target.lm_head.weight, **changes)


def eagle1_reference(kit: SimpleNamespace, target: SimpleNamespace, w: Any, **changes: Any) -> Any:
    facts = known(kit, target, **changes)
    return kit.draft(kit.eagle1_forward, w, target.tokens, target.features(kit.H), STEPS, facts)


def eagle3_reference(kit: SimpleNamespace, target: SimpleNamespace, w: Any, width: int, **changes: Any) -> Any:
    facts = known(kit, target, **changes)
    h = kit.eagle3_fuse(w, target.features(width), facts)
    return kit.draft(kit.eagle3_forward, w, target.tokens, h, STEPS, facts)


def rename(tensors: dict[str, torch.Tensor], *pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = new + name.removeprefix(old) if name.startswith(old) else name
        out[name] = tensor
    return out


# -- EAGLE-1/2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_eagle1_official(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, bias: bool, qkv_bias: bool
) -> None:
    config, w = kit.eagle1(bias=bias, qkv_bias=qkv_bias)
    w["embed_tokens.weight"] = target.embedding.weight.clone()
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    assert head.config.algorithm == "eagle1"
    assert head.config.fc_bias is bias
    compare(head, target, target.features(kit.H), eagle1_reference(kit, target, w))


def test_eagle1_without_embedding_and_with_other_prefix(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path
) -> None:
    config, w = kit.eagle1(bias=True)
    del w["embed_tokens.weight"]
    stored = {f"model.{name}": tensor for name, tensor in w.items()}
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, stored))
    compare(head, target, target.features(kit.H), eagle1_reference(kit, target, w))


def test_eagle1_rope_theta_is_the_heads_own(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle1()
    del w["embed_tokens.weight"]
    head = EagleHead.from_pretrained(kit.write(tmp_path, config | {"rope_theta": 500.0}, w))
    compare(head, target, target.features(kit.H), eagle1_reference(kit, target, w, theta=500.0))
    with pytest.raises(AssertionError):
        compare(head, target, target.features(kit.H), eagle1_reference(kit, target, w))


def test_eagle1_hass_norms(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle1(bias=True)
    del w["embed_tokens.weight"]
    generator = torch.Generator().manual_seed(3)
    for name in ("embed_layernorm", "hidden_layernorm", "lm_head_layernorm"):
        w[f"{name}.weight"] = kit.norm_weight(generator, kit.H)
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    compare(head, target, target.features(kit.H), eagle1_reference(kit, target, w))


def speculators_config(kit: SimpleNamespace, config: dict[str, Any], kind: str, **fields: Any) -> dict[str, Any]:
    layer = {key: value for key, value in config.items() if key not in ("architectures", "draft_vocab_size", "bias")}
    return {
        "architectures": ["EagleSpeculator" if kind == "eagle" else "Eagle3Speculator"],
        "speculators_model_type": kind,
        "speculators_version": "0.1.0",
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer,
        **fields,
    }


@pytest.mark.parametrize("layernorms", [True, False])
def test_speculators_eagle1(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, layernorms: bool) -> None:
    config, w = kit.eagle1(bias=True)
    del w["embed_tokens.weight"]
    if layernorms:
        generator = torch.Generator().manual_seed(3)
        for name in ("embed_layernorm", "hidden_layernorm", "lm_head_layernorm"):
            w[f"{name}.weight"] = kit.norm_weight(generator, kit.H)
    stored = rename(
        w,
        ("layers.0.", "transformer."),
        ("fc.", "fusion_fc."),
        ("embed_layernorm", "embedding_layernorm"),
        ("lm_head_layernorm", "pre_lm_head_layernorm"),
        ("hidden_layernorm", "transformer.input_layernorm"),
    )
    written = speculators_config(
        kit, config, "eagle", fusion_bias=True, layernorms=layernorms,
        transformer_layer_architecture="LlamaDecoderLayer",
    )  # fmt: skip
    head = EagleHead.from_pretrained(kit.write(tmp_path, written, stored))
    compare(head, target, target.features(kit.H), eagle1_reference(kit, target, w))


# -- EAGLE-3 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_eagle3_official(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, draft: bool, qkv_bias: bool
) -> None:
    config, w = kit.eagle3(draft=draft, qkv_bias=qkv_bias)
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    assert head.config.algorithm == "eagle3"
    assert head.config.rope_parameters["rope_theta"] == 10000.0
    assert head.config.feature_layer_ids is None
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H))


def test_eagle3_narrow_head_brings_its_embedding(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3(target_size=32, embedding=True)
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    reference = eagle3_reference(kit, target, w, 96)
    head.bind(torch.nn.Embedding(kit.V, 32), torch.nn.Linear(32, kit.V))
    logits, tokens = head_draft(head, target.tokens, target.features(96), STEPS)
    assert tokens == reference[1]
    torch.testing.assert_close(logits, reference[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_eagle3_wrong_layer_count_in_config(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    head = EagleHead.from_pretrained(kit.write(tmp_path, config | {"num_hidden_layers": 40}, w))
    assert head.config.num_hidden_layers == 1
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H))


def test_eagle3_shapes_win_over_config(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    wrong = config | {
        "intermediate_size": 7,
        "draft_vocab_size": 3,
        "num_key_value_heads": 4,
        "hidden_size": 8,
    }
    head = EagleHead.from_pretrained(kit.write(tmp_path, wrong | {"vocab_size": 11, "head_dim": kit.D}, w))
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H))


def test_eagle3_membership_stands_in_for_offsets(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    stored = {name: tensor for name, tensor in w.items() if name != "d2t"}
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, stored))
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H))


def test_eagle3_zero_offsets_over_the_whole_vocabulary(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path
) -> None:
    config, w = kit.eagle3(draft=False)
    stored = w | {"d2t": torch.zeros(kit.V, dtype=torch.int64), "t2d": torch.ones(kit.V, dtype=torch.bool)}
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, stored))
    assert not head.config.maps_vocabulary
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H))


def test_specforge(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3(embedding=True)
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "rope_scaling": {"rope_type": "default", "rope_theta": 777.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
        "rope_theta": 777.0,
        "tie_word_embeddings": False,
    }
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H, theta=777.0))


@pytest.mark.parametrize("first_layer", ["midlayer.", "layers.0."])
def test_modelopt(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, first_layer: str) -> None:
    config, w = kit.eagle3(draft=False)
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": kit.V,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 15, 28],
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
        },
        "rope_theta": 123.0,
    }
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, rename(w, ("midlayer.", first_layer))))
    assert head.config.feature_layer_ids == [2, 16, 29]
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H, theta=123.0))


def test_modelopt_last_hidden_state_only(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3(draft=False)
    del w["fc.weight"]
    config["eagle_config"] = {"use_aux_hidden_state": False}
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    assert head.config.feature_layer_ids == [-1]
    compare(head, target, target.features(kit.H), eagle3_reference(kit, target, w, kit.H))


def with_input_norm(kit: SimpleNamespace, w: Any, generator: torch.Generator) -> None:
    w["input_norm.weight"] = kit.norm_weight(generator, 3 * kit.H)


def with_feature_norms(kit: SimpleNamespace, w: Any, generator: torch.Generator) -> None:
    for index in range(3):
        w[f"fc_norm.{index}.weight"] = kit.norm_weight(generator, kit.H)


def with_head_norms(kit: SimpleNamespace, w: Any, generator: torch.Generator) -> None:
    for name in ("q_norm", "k_norm"):
        w[f"midlayer.self_attn.{name}.weight"] = kit.norm_weight(generator, kit.D)


def with_second_layer(kit: SimpleNamespace, w: Any, generator: torch.Generator) -> None:
    w |= kit.layer_tensors(generator, "layers.1.", kit.H)
    w["layers.1.input_layernorm.weight"] = kit.norm_weight(generator, kit.H)


def with_nothing(kit: SimpleNamespace, w: Any, generator: torch.Generator) -> None:
    """Leaves the weights as they are."""


VARIANTS = {
    "norm_before_residual": ({"norm_before_residual": True}, with_nothing),
    "norm_before_fc": ({"norm_before_fc": True}, with_input_norm),
    "fc_norm": ({"fc_norm": True}, with_feature_norms),
    "norm_output": ({"norm_output": True}, with_nothing),
    "everything": ({"norm_before_residual": True, "norm_output": True, "fc_norm": True}, with_feature_norms),
    "qk_norm": ({}, with_head_norms),
    "two layers": ({}, with_second_layer),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_speculators_eagle3(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, variant: str) -> None:
    switches, add = VARIANTS[variant]
    config, w = kit.eagle3()
    add(kit, w, torch.Generator().manual_seed(11))
    stored = rename(w, ("midlayer.", "layers.0."))
    written = speculators_config(
        kit, config, "eagle3", draft_vocab_size=kit.DRAFT, eagle_aux_hidden_state_layer_ids=[2, 16, 29],
        **({"norm_before_residual": False} | switches),
    )  # fmt: skip
    head = EagleHead.from_pretrained(kit.write(tmp_path, written, stored))
    assert head.config.feature_layer_ids == [2, 16, 29]
    facts = {name: True for name in ("norm_before_residual", "norm_output") if switches.get(name)}
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H, **facts))
    if facts:  # the switch must matter, or the comparison proves nothing
        with pytest.raises(AssertionError):
            compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H))


def test_speculators_eagle3_without_the_field_normalises_the_residual(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path
) -> None:
    config, w = kit.eagle3()
    written = speculators_config(kit, config, "eagle3", draft_vocab_size=kit.DRAFT)
    head = EagleHead.from_pretrained(kit.write(tmp_path, written, rename(w, ("midlayer.", "layers.0."))))
    reference = eagle3_reference(kit, target, w, 3 * kit.H, norm_before_residual=True)
    compare(head, target, target.features(3 * kit.H), reference)


def test_native_switch_in_eagle_config(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    config["eagle_config"] = {"norm_before_residual": True}
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    reference = eagle3_reference(kit, target, w, 3 * kit.H, norm_before_residual=True)
    compare(head, target, target.features(3 * kit.H), reference)


def test_native_norm_output_is_honoured_with_a_warning(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path
) -> None:
    config, w = kit.eagle3()
    folder = kit.write(tmp_path, config | {"norm_output": True}, w)
    with pytest.warns(UserWarning, match="norm_output"):
        head = EagleHead.from_pretrained(folder)
    compare(
        head,
        target,
        target.features(3 * kit.H),
        eagle3_reference(kit, target, w, 3 * kit.H, norm_output=True),
    )
    with pytest.warns(UserWarning, match="norm_output"):
        head = EagleHead.from_pretrained(folder, norm_output=False)
    compare(head, target, target.features(3 * kit.H), eagle3_reference(kit, target, w, 3 * kit.H))


def test_partial_rotary(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3()
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 2 / 3}
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    reference = eagle3_reference(kit, target, w, 3 * kit.H, theta=50.0, rotary_part=2 / 3)
    compare(head, target, target.features(3 * kit.H), reference)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 3, "layer_types": ["sliding_attention"]}, 3),
        ({"sliding_window": 3, "layer_types": ["full_attention"]}, None),
        ({"sliding_window": 3, "model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0}, 3),
        (
            {"sliding_window": 3, "model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1},
            None,
        ),
        ({"sliding_window": 3, "model_type": "qwen3", "use_sliding_window": False}, None),
        ({"sliding_window": 3, "model_type": "mistral"}, 3),
        ({"sliding_window": 3}, None),
        ({"sliding_window": None}, None),
    ],
)
def test_sliding_window(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, fields: dict[str, Any], window: int | None
) -> None:
    config, w = kit.eagle3()
    head = EagleHead.from_pretrained(kit.write(tmp_path, config | fields, w))
    assert head.config.sliding_window == window
    reference = eagle3_reference(kit, target, w, 3 * kit.H, window=window or 10**6)
    compare(head, target, target.features(3 * kit.H), reference)


def test_five_features(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle3(features=5)
    config |= {"num_aux_hidden_states": 5, "target_hidden_size": kit.H}
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w), feature_layer_ids=[1, 2, 3, 4, 5])
    compare(head, target, target.features(5 * kit.H), eagle3_reference(kit, target, w, 5 * kit.H))


# -- the mistakes that cost acceptance must be visible -----------------------------------------------------


def swapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(w: Any, *args: Any) -> Any:
        columns = w["fc.weight"].chunk(2, dim=1)
        return forward(w | {"fc.weight": torch.cat(columns[::-1], dim=1)}, *args)

    return wrong


def test_swapped_concatenation_would_be_seen(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = kit.eagle1()
    del w["embed_tokens.weight"]
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    facts = known(kit, target)
    wrong = kit.draft(swapped(kit.eagle1_forward), w, target.tokens, target.features(kit.H), STEPS, facts)
    with pytest.raises(AssertionError):
        compare(head, target, target.features(kit.H), wrong)
