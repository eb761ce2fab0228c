# SPDX-License-Identifier: Apache-2.0
"""Features, embedding and lm_head of a target are found for every architecture, and misfits are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_polyspec.eagle import EagleHead, EagleHeadConfig, bind, feature_layers, init_for, select_features, target_parts
from hf_polyspec.integers.linear import QuantizedLinear
from hf_polyspec.integers.weights import QuantizedWeight
from hf_polyspec.quantization import quantize_model

V, LAYERS = 61, 7
COMMON = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "olmo2": ("Olmo2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"n_layer": LAYERS, "n_head": 4}),
    "gpt2": ("GPT2Config", GPT),
    "gptj": ("GPTJConfig", GPT),
    "codegen": ("CodeGenConfig", GPT),
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config_name, extra = ARCHITECTURES[name]
    fields = extra if "n_embd" in extra else COMMON | extra
    return AutoModelForCausalLM.from_config(getattr(transformers, config_name)(**fields)).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_last_feature_is_what_the_lm_head_reads(name: str) -> None:
    """An EAGLE-1 head that reproduced its input exactly would score exactly like the target."""
    model = tiny(name)
    parts = target_parts(model)
    head = bind(
        EagleHead(EagleHeadConfig(algorithm="eagle1", vocab_size=V, hidden_size=32, num_attention_heads=4)),
        model,
    )
    layers = feature_layers(head.config, parts.num_layers)
    ids = torch.randint(3, V, (2, 6))
    out = model(ids, output_hidden_states=layers)
    feature = select_features(out.hidden_states, layers)
    assert feature.shape == (2, 6, 32)
    torch.testing.assert_close(head.logits(feature), out.logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_three_features_are_unnormed_inputs_of_layers(name: str) -> None:
    model = tiny(name)
    head = init_for(model, "eagle3")
    layers = feature_layers(head.config, LAYERS)
    assert layers == [2, 3, 4]
    decoder = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    seen: dict[int, torch.Tensor] = {}

    def remember(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [decoder[i].register_forward_pre_hook(remember(i), with_kwargs=True) for i in layers]
    out = model(torch.randint(3, V, (1, 5)), output_hidden_states=layers)
    for handle in handles:
        handle.remove()
    expected = torch.cat([seen[i] for i in layers], -1)
    assert torch.equal(select_features(out.hidden_states, layers), expected)


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_fresh_head_for_every_architecture(name: str, algorithm: str) -> None:
    model = tiny(name)
    head = init_for(model, algorithm, list(range(5, 25))).eval()
    assert head.is_bound
    assert head.config.draft_vocab_size == 20
    layers = feature_layers(head.config, LAYERS)
    ids = torch.randint(3, V, (2, 6))
    features = select_features(model(ids, output_hidden_states=layers).hidden_states, layers)
    y = head.step(ids[:, 1:], head.fuse(features[:, :-1]))
    token = head.draft_to_target(head.logits(y).argmax(-1))
    assert int(token.min()) >= 5
    assert int(token.max()) < 25
    assert head.get_input_embeddings() is model.get_input_embeddings()
    owned = {id(p) for p in head.parameters()}
    assert not owned & {id(p) for p in model.parameters()}


def test_own_lm_head_starts_as_the_targets_rows() -> None:
    model = tiny("llama")
    ids = [40, 3, 17]
    head = init_for(model, "eagle3", ids)
    rows = model.get_output_embeddings().weight[[3, 17, 40]]
    assert torch.equal(head.lm_head.weight, rows)
    assert head.target_ids().tolist() == [3, 17, 40]
    assert head.training
    head.lm_head.weight.data.zero_()
    assert rows.abs().sum() > 0


def test_narrow_fresh_head_brings_its_own_embedding() -> None:
    model = tiny("qwen3")
    head = init_for(model, "eagle3", hidden_size=16)
    assert head.config.own_embedding
    assert head.config.own_lm_head
    ids = torch.randint(3, V, (1, 4))
    y = head.step(ids, head.fuse(torch.randn(1, 4, 96)))
    assert head.logits(y).shape == (1, 4, V)
    with pytest.raises(ValueError, match="own width"):
        init_for(model, "eagle1", hidden_size=16)
    with pytest.raises(ValueError, match="own_lm_head"):
        init_for(model, "eagle3", hidden_size=16, own_lm_head=False)


def test_fresh_head_takes_dtype_and_fields() -> None:
    model = tiny("llama").to(torch.bfloat16)
    head = init_for(model, "eagle3", num_hidden_layers=2, feature_layer_ids=[1, 5])
    assert head.dtype == torch.bfloat16
    assert len(head.layers) == 2
    assert head.fc.in_features == 64
    assert init_for(model, "eagle1", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0, 0, 0]), (2, [0, 0, 1]), (3, [0, 1, 2]), (5, [0, 2, 4]), (30, [2, 15, 27])]
)
def test_shallow_targets_get_spread_layers(depth: int, layers: list[int]) -> None:
    config = transformers.LlamaConfig(**(COMMON | {"num_hidden_layers": depth}))
    head = init_for(AutoModelForCausalLM.from_config(config), "eagle3")
    assert head.config.feature_layer_ids == layers


@pytest.mark.parametrize("draft_vocab", [[], [V], [-1], [3, 3]])
def test_nonsense_draft_vocabularies_are_refused(draft_vocab: list[int]) -> None:
    with pytest.raises(ValueError, match="draft_vocab"):
        init_for(tiny("llama"), "eagle3", draft_vocab)


# -- misfits -----------------------------------------------------------------------------------------------


def head_for(**fields: Any) -> EagleHead:
    sizes = {"vocab_size": V, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 8}
    return EagleHead(EagleHeadConfig(**(sizes | fields)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 24}, "features 24 wide; the hidden states of LlamaForCausalLM are 32 wide"),
        ({"target_hidden_size": 24}, "features 24 wide"),
        ({"hidden_size": 24, "target_hidden_size": 32}, "no embedding of its own"),
        ({"vocab_size": 5000}, "vocabulary of 5000"),
        ({"feature_layer_ids": [2, 5, 7]}, "no un-normed hidden state 7"),
        ({"feature_layer_ids": [2, 5, -2]}, "no un-normed hidden state -2"),
        ({"num_features": 4}, "set feature_layer_ids"),
    ],
)
def test_heads_that_do_not_fit_are_refused_in_one_sentence(fields: dict[str, Any], words: str) -> None:
    head = head_for(**fields)
    with pytest.raises(ValueError, match=words):
        bind(head, tiny("llama"))
    assert not head.is_bound


def test_default_layers_of_a_shallow_target_are_refused() -> None:
    config = transformers.LlamaConfig(**(COMMON | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="a target of 2 layers"):
        bind(head_for(), AutoModelForCausalLM.from_config(config))


def test_encoder_decoders_and_headless_models_are_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=V, d_model=32, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    )
    with pytest.raises(TypeError, match="encoder-decoder"):
        target_parts(t5)
    with pytest.raises(TypeError, match="lm_head"):
        target_parts(transformers.LlamaModel(transformers.LlamaConfig(**COMMON)))


def test_a_missing_hidden_state_is_noticed() -> None:
    with pytest.raises(ValueError, match="no hidden state"):
        select_features((torch.zeros(1, 1, 2), None), [0, 1])


def test_states_of_several_streams_are_refused() -> None:
    """Gemma-3n keeps several versions of each state side by side."""
    with pytest.raises(ValueError, match="batch, tokens, width"):
        select_features((torch.zeros(2, 1, 6, 32),), [-1])


def test_binding_to_a_copy_of_integers_builds_none_of_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are bound in every call, and the lm_head of a copy is its largest layer."""
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON | {"vocab_size": 64})).eval()
    head = init_for(model, "eagle1")
    assert not head.config.own_lm_head
    copy = quantize_model(model, 8)
    lm_head = copy.get_output_embeddings()
    assert isinstance(lm_head, QuantizedLinear)
    asked: list[str] = []
    own = QuantizedWeight.dequantize
    monkeypatch.setattr(QuantizedWeight, "dequantize", lambda self: asked.append("whole matrix") or own(self))
    assert bind(head, copy).is_bound
    assert not asked
