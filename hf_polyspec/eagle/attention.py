# SPDX-License-Identifier: Apache-2.0
"""The decoder layer of an EAGLE head: norms, rotary angles, attention, MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hf_polyspec.cpu.block_parts import has_hooks
from hf_polyspec.cpu.compiled import computes
from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.host.attention import ACT2FN, ROPE_INIT_FUNCTIONS, dynamic_rope_update

Rotary = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_GROWTH = 256

# Rotary variants whose frequencies depend on how long the text is.
_CHANGING = ("dynamic", "longrope")


class EagleRMSNorm(nn.Module):
    """Root-mean-square norm computed in float32, as in Llama."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dtype is self.weight.dtype and computes(hidden):
            from hf_polyspec.cpu.compiled.blocks import rms_norm

            return rms_norm(hidden.contiguous(), self.weight.contiguous(), self.eps)[0]
        if hidden.dtype == self.weight.dtype == torch.float32:  # one call instead of six
            return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def plain_norm(norm: nn.Module) -> tuple[torch.Tensor, float] | None:
    """Weights `[H]` and epsilon of a head's norm; None where it is somebody else's code."""
    if type(norm) is not EagleRMSNorm or "forward" in norm.__dict__ or has_hooks(norm):
        return None
    return norm.weight, norm.eps


class EagleAttention(nn.Module):
    """Llama attention, except that its input may be wider than its output."""

    def __init__(self, config: EagleHeadConfig, input_size: int) -> None:
        super().__init__()
        self.head_dim = int(config.head_dim or 0)
        heads, kv_heads = config.num_attention_heads, int(config.num_key_value_heads or 0)
        bias = config.attention_bias
        self.q_proj = nn.Linear(input_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            self.q_norm = EagleRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = EagleRMSNorm(self.head_dim, config.rms_norm_eps)

    def project(
        self, hidden: torch.Tensor, rotary: Rotary, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns rotated queries `[B, n_h, T - first, d]`, rotated keys and values `[B, n_kv, T, d]`."""
        batch, width = hidden.shape[0], self.head_dim
        asking, angles = (hidden, rotary) if not first else (hidden[:, first:], _from(rotary, first))
        query = self.q_norm(self.q_proj(asking).view(batch, asking.shape[1], -1, width)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(batch, hidden.shape[1], -1, width)).transpose(1, 2)
        value = self.v_proj(hidden).view(batch, hidden.shape[1], -1, width).transpose(1, 2)
        return rotate(query, angles), rotate(key, rotary), value

    def forward(self, hidden: torch.Tensor, rotary: Rotary, attend: Attend, first: int = 0) -> torch.Tensor:
        query, key, value = self.project(hidden, rotary, first)
        # [B, n_h, T, d] -> [B, T, n_h * d]
        mixed = attend(query, key, value).transpose(1, 2).flatten(2)
        out: torch.Tensor = self.o_proj(mixed)
        return out


def _from(rotary: Rotary, first: int) -> Rotary:
    """The angles of the positions from `first` on."""
    return rotary[0][:, first:], rotary[1][:, first:]


def rotate(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turns `[B, n, T, d]` by the rotary angles `[B, T, r]` (halves paired, as in Llama; arXiv 2104.09864).

    Where r < d (partial rotary embeddings) the last d - r values stay as they are.
    """
    cos, sin = rotary[0].unsqueeze(1), rotary[1].unsqueeze(1)
    turned, kept = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


@dataclass(frozen=True)
class _AngleTable:
    """Angles `[P, r]` of the first positions, and what they were computed from and for."""

    made_of: torch.Tensor
    kind: tuple[torch.dtype, torch.device]
    cos: torch.Tensor
    sin: torch.Tensor


class EagleRotaryEmbedding(nn.Module):
    """Rotary angles of any position: computed when asked, or read from a table that grows; there is no longest context.

    The scaled variants (linear, dynamic, yarn, llama3, ...) are transformers' own; unlike Llama's module this
    one obeys `partial_rotary_factor` in the plain variant.

    Args:
        config: The head's config.
    """

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: EagleHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type: str = (config.rope_parameters or {})["rope_type"]
        compute: Callable[..., Any] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        # transformers refills both after loading onto an empty model
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        self._table: _AngleTable | None = None

    @staticmethod
    def compute_default_rope_parameters(config: EagleHeadConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies `[r / 2]`, r = partial_rotary_factor * head_dim, and the scaling 1.

        Args:
            config: The head's config.
            **kwargs: What transformers passes to scaled variants; not needed here.
        """
        rope = config.rope_parameters or {}
        size = int((config.head_dim or 0) * rope.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float) / size
        return 1.0 / rope["rope_theta"] ** exponents, 1.0

    def _angles(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Rotary:
        frequencies = self.inv_freq.to(device=hidden.device, dtype=torch.float)
        # [B, T, r / 2]
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden.dtype), sin.to(hidden.dtype)

    forward = torch.no_grad()(dynamic_rope_update(_angles))

    @torch.no_grad()
    def lookup(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Rotary:
        """The same angles read from a table that grows as needed, where positions are on the host and angles fixed."""
        if self.rope_type in _CHANGING or position_ids.device.type != "cpu" or not position_ids.numel():
            angles: Rotary = self.forward(hidden, position_ids.to(hidden.device))
            return angles
        cos, sin = self._until(hidden, int(position_ids.max()))
        places = position_ids.to(hidden.device)
        return cos[places], sin[places]

    @torch.no_grad()
    def table(self, hidden: torch.Tensor, highest: int) -> Rotary | None:
        """The angles `[P, r]` of all positions up to one and some more; None where they depend on how far it is."""
        return None if self.rope_type in _CHANGING else self._until(hidden, highest)

    def _until(self, hidden: torch.Tensor, highest: int) -> Rotary:
        kind, table = (hidden.dtype, hidden.device), self._table
        if table is None or table.made_of is not self.inv_freq or table.kind != kind or len(table.cos) <= highest:
            places = torch.arange(2 * highest + _GROWTH, device=hidden.device)
            table = self._table = _AngleTable(self.inv_freq, kind, *self._angles(hidden, places))
        return table.cos, table.sin


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention by compiled code or torch's fused kernels, grouped heads included."""
    if computes(query[:, 0]) and not (mask is None and query.shape[2] > 1 and not causal):
        found = _compiled(query, key, value, mask, scale)
        if found is not None:
            return found
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _compiled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor | None:
    """The same in compiled code, if keys, values and mask lie as it reads them."""
    from hf_polyspec.cpu.compiled.attention import attend, readable

    batch, heads, fed, size = query.shape
    alike = key.dtype is value.dtype is query.dtype and key.shape == value.shape and key.stride() == value.stride()
    if not alike or not readable(key) or (mask is not None and _for_all_heads(mask) != (batch, fed, key.shape[2])):
        return None
    out = attend(query.contiguous(), key, value, mask, size**-0.5 if scale is None else scale)
    return out.view(batch, fed, heads, size).transpose(1, 2)


def _for_all_heads(mask: torch.Tensor) -> tuple[int, int, int] | None:
    """Batch, positions and entries of a mask that is the same for every head, None for another."""
    return (mask.shape[0], mask.shape[2], mask.shape[3]) if mask.dim() == 4 and mask.shape[1] == 1 else None


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Scaled dot-product attention spelled out, with the softmax in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    mixed: torch.Tensor = scores.softmax(-1).to(query.dtype) @ value
    return mixed


ATTENTION = {"sdpa": sdpa, "eager": eager}


class EagleMLP(nn.Module):
    """Gated MLP, as in Llama."""

    def __init__(self, config: EagleHeadConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class EagleLayer(nn.Module):
    """One decoder layer of a head; the first of an EAGLE-3 head reads embedding and feature side by side.

    With x the stream, E the embedding and `||` concatenation:

    - EAGLE-3, first layer: `a = r + Attn(RMS_in(E) || RMS_hid(x))`, where r is x, or RMS_hid(x) with
      `norm_before_residual`;
    - EAGLE-1, first layer: `a = x + Attn(x)`, or `Attn(RMS_in(x))` with `fused_norm`;
    - further layers: `a = x + Attn(RMS_in(x))`;

    and always `y = a + MLP(RMS_post(a))`.
    """

    def __init__(self, config: EagleHeadConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.side_by_side = config.algorithm == "eagle3" and index == 0
        self.norm_before_residual = config.norm_before_residual
        self.self_attn = EagleAttention(config, 2 * size if self.side_by_side else size)
        self.mlp = EagleMLP(config)
        self.input_layernorm: nn.Module = nn.Identity()
        if index > 0 or config.algorithm == "eagle3" or config.fused_norm:
            self.input_layernorm = EagleRMSNorm(size, eps)
        if self.side_by_side:
            self.hidden_norm = EagleRMSNorm(size, eps)
        self.post_attention_layernorm = EagleRMSNorm(size, eps)

    def attention_input(self, hidden: torch.Tensor, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what attention reads, `[B, T, H or 2H]`, and the residual `[B, T, H]` it is added to."""
        if not self.side_by_side:
            return self.input_layernorm(hidden), hidden
        normed = self.hidden_norm(hidden)
        pair = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        return pair, normed if self.norm_before_residual else hidden

    def forward(
        self, hidden: torch.Tensor, embedded: torch.Tensor, rotary: Rotary, attend: Attend, first: int = 0
    ) -> torch.Tensor:
        """Runs the layer.

        Args:
            hidden: `[B, T, H]`, the stream.
            embedded: `[B, T, H]`, the tokens' embeddings.
            rotary: angles of the T positions.
            attend: from queries, keys and values to what attention gives.
            first: positions before it are attended to but not asked for.

        Returns:
            `[B, T - first, H]`.
        """
        attention_input, residual = self.attention_input(hidden, embedded)
        hidden = residual[:, first:] + self.self_attn(attention_input, rotary, attend, first)
        out: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out
