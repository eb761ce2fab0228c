# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in every published layout, and an independent reference of what a head computes.

The reference reads the stored tensors under their official names and recomputes every position from the
formulas; it shares no code with the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

V, H, INNER, HEADS, KV, D = 53, 24, 40, 4, 2, 6
DRAFT = 17

Tensors = dict[str, torch.Tensor]


def draw(generator: torch.Generator, *shape: int, scale: float | None = None) -> torch.Tensor:
    """Gaussian numbers; by default of a size that keeps activations of order one through a projection."""
    return torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5 if scale is None else scale)


def norm_weight(generator: torch.Generator, size: int) -> torch.Tensor:
    return 1 + 0.3 * torch.randn(size, generator=generator)


def layer_tensors(
    generator: torch.Generator, prefix: str, width: int, *, size: int = H, qkv_bias: bool = False
) -> Tensors:
    """The projections and the post-attention norm of one Llama layer."""
    tensors = {
        "self_attn.q_proj.weight": draw(generator, HEADS * D, width),
        "self_attn.k_proj.weight": draw(generator, KV * D, width),
        "self_attn.v_proj.weight": draw(generator, KV * D, width),
        "self_attn.o_proj.weight": draw(generator, size, HEADS * D),
        "mlp.gate_proj.weight": draw(generator, INNER, size),
        "mlp.up_proj.weight": draw(generator, INNER, size),
        "mlp.down_proj.weight": draw(generator, size, INNER),
        "post_attention_layernorm.weight": norm_weight(generator, size),
    }
    if qkv_bias:
        for name, rows in (("q", HEADS * D), ("k", KV * D), ("v", KV * D)):
            tensors[f"self_attn.{name}_proj.bias"] = draw(generator, rows)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def official_config(**more: Any) -> dict[str, Any]:
    """What an official checkpoint of any EAGLE says of its one layer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": H,
        "intermediate_size": INNER,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": 1,
        "num_key_value_heads": KV,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "vocab_size": V,
        **more,
    }


def eagle1(*, bias: bool = False, qkv_bias: bool = False, seed: int = 0) -> tuple[dict[str, Any], Tensors]:
    """An EAGLE-1/2 official checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    config = official_config()
    if not bias:
        config["bias"] = False
    if qkv_bias:
        config["qkv_bias"] = True
    tensors = {
        "embed_tokens.weight": draw(generator, V, H, scale=1.0),
        "fc.weight": draw(generator, H, 2 * H),
    }
    if bias:
        tensors["fc.bias"] = draw(generator, H)
    tensors |= layer_tensors(generator, "layers.0.", H, qkv_bias=qkv_bias)
    return config, tensors


def offsets(seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A draft vocabulary of DRAFT ids: (d2t offsets [DRAFT], t2d membership [V])."""
    ids = torch.randperm(V, generator=torch.Generator().manual_seed(seed))[:DRAFT].sort().values
    member = torch.zeros(V, dtype=torch.bool)
    member[ids] = True
    return ids - torch.arange(DRAFT), member


def eagle3(
    *,
    draft: bool = True,
    target_size: int = H,
    qkv_bias: bool = False,
    embedding: bool = False,
    features: int = 3,
    seed: int = 0,
) -> tuple[dict[str, Any], Tensors]:
    """An EAGLE-3 official checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    config = official_config(draft_vocab_size=DRAFT if draft else V)
    if target_size != H:
        config["target_hidden_size"] = target_size
    rows = DRAFT if draft else V
    tensors = {"fc.weight": draw(generator, H, features * target_size)}
    tensors |= layer_tensors(generator, "midlayer.", 2 * H, qkv_bias=qkv_bias)
    for name in ("input_layernorm", "hidden_norm"):
        tensors[f"midlayer.{name}.weight"] = norm_weight(generator, H)
    tensors["norm.weight"] = norm_weight(generator, H)
    tensors["lm_head.weight"] = draw(generator, rows, H)
    if draft:
        tensors["d2t"], tensors["t2d"] = offsets()
    if embedding:
        tensors["embed_tokens.weight"] = draw(generator, V, H, scale=1.0)
    return config, tensors


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


# -- the reference -----------------------------------------------------------------------------------------


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turn(x: torch.Tensor, positions: list[int], theta: float, part: int) -> torch.Tensor:
    """Rotates the first `part` values of x [T, n, d]: value j is paired with value j + part/2."""
    out = x.clone()
    for t, position in enumerate(positions):
        for j in range(part // 2):
            angle = torch.tensor(position * theta ** (-2 * j / part), dtype=torch.float64)
            cos, sin = angle.cos().float(), angle.sin().float()
            a, b = x[t, :, j], x[t, :, j + part // 2]
            out[t, :, j], out[t, :, j + part // 2] = a * cos - b * sin, b * cos + a * sin
    return out


def layer(
    w: Tensors,
    prefix: str,
    read: torch.Tensor,
    residual: torch.Tensor,
    positions: list[int],
    facts: SimpleNamespace,
) -> torch.Tensor:
    """One Llama layer on [T, *], causal, without a cache: returns [T, H]."""
    count = len(positions)

    def project(name: str, heads: int) -> torch.Tensor:
        out = read @ w[f"{prefix}self_attn.{name}_proj.weight"].T
        bias = w.get(f"{prefix}self_attn.{name}_proj.bias")
        return (out if bias is None else out + bias).view(count, heads, D)

    query, key, value = project("q", HEADS), project("k", KV), project("v", KV)
    if f"{prefix}self_attn.q_norm.weight" in w:
        query = rms(query, w[f"{prefix}self_attn.q_norm.weight"], facts.eps)
        key = rms(key, w[f"{prefix}self_attn.k_norm.weight"], facts.eps)
    part = int(D * facts.rotary_part)
    query, key = turn(query, positions, facts.theta, part), turn(key, positions, facts.theta, part)
    mixed = torch.zeros(count, HEADS, D)
    for head in range(HEADS):
        group = head // (HEADS // KV)
        for t in range(count):
            first = max(0, t + 1 - facts.window)
            scores = key[first : t + 1, group] @ query[t, head] / D**0.5
            mixed[t, head] = scores.softmax(0) @ value[first : t + 1, group]
    a = residual + mixed.view(count, HEADS * D) @ w[f"{prefix}self_attn.o_proj.weight"].T
    normed = rms(a, w[f"{prefix}post_attention_layernorm.weight"], facts.eps)
    gate = torch.nn.functional.silu(normed @ w[f"{prefix}mlp.gate_proj.weight"].T)
    up = normed @ w[f"{prefix}mlp.up_proj.weight"].T
    return a + (gate * up) @ w[f"{prefix}mlp.down_proj.weight"].T


def facts(**changes: Any) -> SimpleNamespace:
    base = {
        "eps": 1e-5,
        "theta": 10000.0,
        "rotary_part": 1.0,
        "window": 10**6,
        "norm_before_residual": False,
        "norm_output": False,
        "embedding": None,
        "lm_head": None,
    }
    return SimpleNamespace(**(base | changes))


def eagle1_forward(
    w: Tensors, tokens: list[int], features: torch.Tensor, positions: list[int], known: SimpleNamespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """EAGLE-1 on the whole sequence: (y [T, H], logits [T, V]). Features [T, H] are post-norm states."""
    embedded = known.embedding[tokens]
    if "embed_layernorm.weight" in w:
        embedded = rms(embedded, w["embed_layernorm.weight"], known.eps)
    x = torch.cat([embedded, features], -1) @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(H))
    read = rms(x, w["hidden_layernorm.weight"], known.eps) if "hidden_layernorm.weight" in w else x
    y = layer(w, "layers.0.", read, x, positions, known)
    last = rms(y, w["lm_head_layernorm.weight"], known.eps) if "lm_head_layernorm.weight" in w else y
    return y, last @ known.lm_head.T


def eagle3_fuse(w: Tensors, features: torch.Tensor, known: SimpleNamespace) -> torch.Tensor:
    """fc(g_low | g_mid | g_high) of [T, 3 H_t], with the norms of the variants."""
    if "input_norm.weight" in w:
        features = rms(features, w["input_norm.weight"], known.eps)
    if "fc_norm.0.weight" in w:
        parts = features.chunk(3, -1)
        features = torch.cat([rms(p, w[f"fc_norm.{i}.weight"], known.eps) for i, p in enumerate(parts)], -1)
    return features @ w["fc.weight"].T if "fc.weight" in w else features


def eagle3_forward(
    w: Tensors, tokens: list[int], h: torch.Tensor, positions: list[int], known: SimpleNamespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """EAGLE-3 on all of the fused or predicted features h [T, H]: (next feature [T, H], logits [T, Vd])."""
    embedding = w.get("embed_tokens.weight", known.embedding)
    normed = rms(h, w["midlayer.hidden_norm.weight"], known.eps)
    read = torch.cat([rms(embedding[tokens], w["midlayer.input_layernorm.weight"], known.eps), normed], -1)
    y = layer(w, "midlayer.", read, normed if known.norm_before_residual else h, positions, known)
    index = 1
    while f"layers.{index}.input_layernorm.weight" in w:
        read = rms(y, w[f"layers.{index}.input_layernorm.weight"], known.eps)
        y = layer(w, f"layers.{index}.", read, y, positions, known)
        index += 1
    last = rms(y, w["norm.weight"], known.eps) if "norm.weight" in w else y
    return (last if known.norm_output else y), last @ w["lm_head.weight"].T


def draft(forward: Any, w: Tensors, tokens: list[int], h: torch.Tensor, steps: int, known: SimpleNamespace) -> Any:
    """Prefills with true features h [T, H], then drafts greedily: (all logits [T + steps, Vd], tokens)."""
    d2t = w.get("d2t")
    tokens, collected = list(tokens), []
    for step in range(steps + 1):
        y, logits = forward(w, tokens, h, list(range(len(tokens))), known)
        collected = logits if step == 0 else torch.cat([collected, logits[-1:]])
        best = int(logits[-1].argmax())
        tokens.append(best + int(d2t[best]) if d2t is not None else best)
        h = torch.cat([h, y[-1:]])
    return collected, tokens


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Makers of checkpoints and the reference, in one bundle."""
    return SimpleNamespace(
        V=V, H=H, INNER=INNER, HEADS=HEADS, KV=KV, D=D, DRAFT=DRAFT,
        eagle1=eagle1, eagle3=eagle3, write=write, facts=facts, offsets=offsets, draw=draw,
        norm_weight=norm_weight, layer_tensors=layer_tensors, eagle1_forward=eagle1_forward,
        eagle3_forward=eagle3_forward, eagle3_fuse=eagle3_fuse, draft=draft,
    )  # fmt: skip


@pytest.fixture(scope="session")
def target() -> SimpleNamespace:
    """A target's embedding and lm_head modules, features of a short text, and the text."""
    generator = torch.Generator().manual_seed(99)
    embedding, lm_head = torch.nn.Embedding(V, H), torch.nn.Linear(H, V, bias=False)
    with torch.no_grad():
        embedding.weight.copy_(draw(generator, V, H, scale=1.0))
        lm_head.weight.copy_(draw(generator, V, H))
    tokens = torch.randint(0, V, (6,), generator=generator).tolist()
    return SimpleNamespace(
        embedding=embedding.requires_grad_(False),
        lm_head=lm_head.requires_grad_(False),
        tokens=tokens,
        features=lambda width: draw(torch.Generator().manual_seed(7), len(tokens), width, scale=1.0),
    )
