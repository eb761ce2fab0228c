# SPDX-License-Identifier: Apache-2.0
"""The EAGLE draft head: one small layer that reads a larger model's features and guesses its next tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig

from hf_polyspec.eagle.attention import (
    ATTENTION,
    Attend,
    EagleLayer,
    EagleRMSNorm,
    EagleRotaryEmbedding,
    Rotary,
)
from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.fused_step import fused_step
from hf_polyspec.eagle.head_cache import HeadCache
from hf_polyspec.eagle.masks import attention_mask_4d, default_positions, windowed
from hf_polyspec.eagle.saving import SavedHead
from hf_polyspec.eagle.vocabulary import SLICES, Borrowed, Rows, VocabularySlice, lm_head_logits
from hf_polyspec.host.attention import attention_name
from hf_polyspec.host.modeling import AutoModel, ModelOutput

Reader = Callable[[Callable[..., Any], "str | os.PathLike[str] | None", tuple[Any, ...], dict[str, Any]], Any]
"""From transformers' own loader and the arguments of `from_pretrained` to the head."""


@dataclass
class EagleHeadOutput(ModelOutput):
    """What one pass of a head returns.

    Args:
        logits: `[B, T, Vd]`, over the head's own ids.
        hidden: `[B, T, H]`, the head's guess of the next feature; what the next draft step reads.
    """

    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


class EagleHead(SavedHead):
    """An EAGLE-1, EAGLE-2 or EAGLE-3 draft head for any decoder-only target.

    At position i the head reads the target's feature of token i together with the embedding of token i+1,
    and guesses token i+2 (arXiv 2401.15077, arXiv 2503.01840). Target features pass through `fuse` once; the
    head's own output feeds the next step as it is. The embedding, and where the head has none of its own the
    lm_head, are the target's modules: `bind` them before the first step. They are neither copied nor saved.

    Args:
        config: The head's configuration.
    """

    config: EagleHeadConfig
    config_class = EagleHeadConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _read: ClassVar[Reader]
    d2t: torch.Tensor

    def __init__(self, config: EagleHeadConfig) -> None:
        super().__init__(config)
        size, eps, features = config.hidden_size, config.rms_norm_eps, config.num_features or 1
        if config.algorithm == "eagle1":
            self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        elif config.has_fc:
            self.fc = nn.Linear(config.feature_size, size, bias=config.fc_bias)
        if config.embed_norm:
            self.embed_layernorm = EagleRMSNorm(size, eps)
        if config.norm_before_fc:
            self.input_norm = EagleRMSNorm(config.feature_size, eps)
        if config.fc_norm:
            width = config.feature_size // features
            self.fc_norm = nn.ModuleList(EagleRMSNorm(width, eps) for _ in range(features))
        self.layers = nn.ModuleList(EagleLayer(config, index) for index in range(config.num_hidden_layers))
        if config.final_norm:
            self.norm = EagleRMSNorm(size, eps)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, size)
        if config.own_lm_head:
            self.lm_head = nn.Linear(size, int(config.draft_vocab_size or 0), bias=False)
        if config.maps_vocabulary:
            # target id = draft id + d2t[draft id]
            self.register_buffer("d2t", torch.zeros(int(config.draft_vocab_size or 0), dtype=torch.long))
        self.rotary_emb = EagleRotaryEmbedding(config)
        self._no_split_modules = ["EagleLayer"]
        self._borrowed = Borrowed()
        self._rows: VocabularySlice | None = None
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a head from a folder or a hub id, in this library's or any published EAGLE layout.

        Recognised: EAGLE-1/2 and EAGLE-3 official, speculators (EAGLE-1 0.1, EAGLE-3), SpecForge, ModelOpt.
        Every key of the checkpoint must find its place, and every weight of the head its key.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: Passed to `PreTrainedModel.from_pretrained`.
            **kwargs: The usual ones (`dtype`, `device_map`, `revision`, `token`, ...), and any field of
                `EagleHeadConfig` that the caller knows better than the checkpoint.

        Returns:
            The head, in evaluation mode; with `output_loading_info=True` also transformers' loading report.

        Raises:
            ValueError: If keys are missing, unexpected or misshapen (all are listed), or if the checkpoint
                asks for a variant that is not supported (named).
            OSError: If there is no checkpoint.
        """
        return cls._read(super().from_pretrained, pretrained_model_name_or_path, args, kwargs)

    @classmethod
    def read_by(cls, reader: Reader) -> None:
        """Sets what `from_pretrained` reads a checkpoint with; the package `eagle` does so when it is imported."""
        cls._read = staticmethod(reader)

    @property
    def device(self) -> torch.device:
        """Where the head's weights are; asked for many times a step, so no search through all of them."""
        return self._first_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the head's weights."""
        return self._first_weight.dtype

    @property
    def _first_weight(self) -> torch.Tensor:
        layers: Any = self._modules["layers"]  # without the detours of `nn.Module.__getattr__`
        weight: torch.Tensor = layers._modules["0"]._modules["post_attention_layernorm"]._parameters["weight"]
        return weight

    # -- the target's modules --------------------------------------------------------------------------------

    def bind(
        self,
        embed_tokens: nn.Module,
        lm_head: nn.Module | None = None,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        name: str = "",
        architectures: tuple[str, ...] = (),
    ) -> EagleHead:
        """Lends the head the target's embedding and lm_head, without copying or registering them.

        A head that brings its own embedding lets it go here when it equals the target's, else keeps it.

        Args:
            embed_tokens: Module from ids to embeddings, V rows of width H.
            lm_head: Module from hidden states to V logits; needed if the head has none of its own.
            logit_scale: Factor the target applies to its lm_head's output.
            logit_softcap: The target's final logit soft cap c, as in c * tanh(logits / c).
            name: What the target was loaded by, for exports.
            architectures: The target's class, likewise.

        Returns:
            The head itself.

        Raises:
            ValueError: If the modules do not fit the head.
        """
        borrowed = Borrowed.checked(self, embed_tokens, lm_head, logit_scale, logit_softcap)
        self._borrowed = replace(borrowed, name=name, architectures=architectures)
        self._rows = None
        if self.config.own_embedding and self._borrowed.same_embedding(self.embed_tokens):
            del self.embed_tokens
            self.config.own_embedding = False
        return self

    @property
    def borrowed(self) -> Borrowed:
        """The target's modules that the head uses."""
        return self._borrowed

    @property
    def is_bound(self) -> bool:
        """Whether the head has everything it needs to draft."""
        has_embedding = self.config.own_embedding or self._borrowed.embed_tokens is not None
        return has_embedding and bool(self.config.own_lm_head or self._borrowed.lm_head is not None)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding in use, the head's own or the target's."""
        return self.embed_tokens if self.config.own_embedding else self._borrowed.need_embedding()

    def get_output_embeddings(self) -> nn.Module | None:
        """Returns the head's own lm_head, or `None` where the target's is used."""
        return self.lm_head if self.config.own_lm_head else None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeds target ids `[B, T]` as `[B, T, H]`, on the head's device and in its dtype."""
        module = self.get_input_embeddings()
        device = getattr(getattr(module, "weight", None), "device", token_ids.device)
        # an offloaded embedding (meta) is moved to its inputs by its own hook
        ids = token_ids if device.type == "meta" else token_ids.to(device)
        embedded: torch.Tensor = module(ids).to(device=self.device, dtype=self.dtype)
        return embedded

    # -- drafting --------------------------------------------------------------------------------------------

    def new_cache(self) -> HeadCache:
        """Returns an empty cache for `step`."""
        return HeadCache()

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Turns target features into what the first layer reads.

        Args:
            features: `[B, T, num_features * H_t]`, concatenated in the order of `feature_layer_ids`.

        Returns:
            `[B, T, H]`. For EAGLE-1 the features as they are; for EAGLE-3 their projection.

        Raises:
            ValueError: If the width is not the head's.
        """
        if features.shape[-1] != self.config.feature_size:
            raise ValueError(f"The head reads features {self.config.feature_size} wide, got {features.shape[-1]}.")
        features = features.to(device=self.device, dtype=self.dtype)
        if self.config.algorithm == "eagle1" or not self.config.has_fc:
            return features
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        fused: torch.Tensor = self.fc(features)
        return fused

    def rotary(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Rotary:
        """Returns the rotary angles (cos, sin), each `[B, T, r]`, of any positions, however far."""
        angles: Rotary = self.rotary_emb(hidden, position_ids)
        return angles

    def mix(self, token_ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what enters the first layer: the stream and the embedding, each `[B, T, H]`.

        For EAGLE-1 the stream is `fc(E || f)`; for EAGLE-3 it is the feature itself.
        """
        embedded = self.embed(token_ids)
        features = features.to(device=self.device, dtype=self.dtype)
        if self.config.algorithm == "eagle3":
            return features, embedded
        if self.config.embed_norm:
            embedded = self.embed_layernorm(embedded)
        return self.fc(torch.cat((embedded, features), dim=-1)), embedded

    def step(
        self,
        token_ids: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: HeadCache | None = None,
    ) -> torch.Tensor:
        """Runs the head over T pairs of a feature and the token that followed it.

        Args:
            token_ids: Target ids, `[B, T]`: the token *after* each feature's own.
            features: `[B, T, H]`: `fuse(target features)`, or what an earlier step returned.
            position_ids: Positions of the features, `[B, T]` or `[1, T]`; default: in order, not counting
                padding.
            attention_mask: `None` (causal over cache and input), `[B, S]` with 0 for padding, or `[B or 1, 1
                or n_h, T, S]` boolean (True is visible) or additive; S is the cache's length plus T.
            cache: Entries of earlier steps; extended by T.

        Returns:
            `[B, T, H]`: the guess of the next feature, read by `logits` and by the next step.

        Raises:
            ValueError: If shapes do not fit or the head is not bound to a target.
        """
        batch, count = token_ids.shape
        size, past = self.config.hidden_size, cache.length if cache is not None else 0
        if features.shape != (batch, count, size):
            raise ValueError(
                f"features must be [{batch}, {count}, {size}] (fuse target features first), got {list(features.shape)}."
            )
        if position_ids is None:
            position_ids = default_positions(attention_mask, past, count, self.device)
        mask, causal = attention_mask_4d(attention_mask, past, count, self.device, self.dtype)
        stream, embedded = self.mix(token_ids, features)
        if self.config.sliding_window is not None:
            queries = position_ids.to(self.device).expand(batch, -1)
            keys = queries if cache is None else cache.append_positions(queries)
            mask, causal = windowed(mask, causal, queries, keys, self.config.sliding_window), False
        rotary: Rotary = self.rotary_emb.lookup(stream, position_ids)
        found = fused_step(self, stream, embedded, rotary, mask, causal, cache)
        if found is not None:
            return found
        for index, layer in enumerate(self.layers):
            stream = layer(stream, embedded, rotary, self._attend(index, mask, causal, cache))
        if cache is not None:
            cache.advance(count)
        return self.norm(stream) if self.config.norm_output else stream

    def _attend(self, index: int, mask: torch.Tensor | None, causal: bool, cache: HeadCache | None) -> Attend:
        function = ATTENTION[attention_name(self.config)]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            if cache is not None:
                key, value = cache.append(index, key, value)
            return function(query, key, value, mask, causal)

        return attend

    def logits(self, hidden: torch.Tensor, rows: Rows | None = None) -> torch.Tensor:
        """Scores the next token.

        Args:
            hidden: `[..., H]`, what `step` returned.
            rows: A slice of the head's ids from `vocabulary_slice`, to score only those.

        Returns:
            `[..., Vd]` (or one column per row of the slice), raw logits over the head's ids: translate chosen
            ids with `draft_to_target`.

        Raises:
            ValueError: If the head is not bound to a target whose lm_head it needs.
        """
        return lm_head_logits(self, self.normed(hidden), rows)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What an lm_head reads of what `step` returned."""
        return self.norm(hidden) if self.config.final_norm and not self.config.norm_output else hidden

    def vocabulary_slice(self, target_ids: torch.Tensor) -> VocabularySlice:
        """Copies the lm_head rows of some target ids, so that only they are scored.

        The idea is FR-Spec's (arXiv 2502.14856).

        Args:
            target_ids: `[N]` distinct target ids, each of which the head can score.

        Returns:
            The slice, for `logits` and `draft_to_target`.

        Raises:
            ValueError: If an id is outside the head's vocabulary, or the rows cannot be read (quantised).
        """
        return VocabularySlice.of(self, target_ids)

    def draft_to_target(self, ids: torch.Tensor, rows: Rows | None = None) -> torch.Tensor:
        """Translates the head's ids (or a slice's columns) of any shape into target ids."""
        if rows is not None:
            return rows.target_ids.to(ids.device)[ids]
        if not self.config.maps_vocabulary:
            return ids
        return ids + self.d2t.to(ids.device)[ids]

    def borrowed_rows(self) -> VocabularySlice:
        """Returns the target's lm_head rows for all ids of a head that maps the vocabulary, copied once."""
        rows = self._rows
        if rows is None or rows.weight.device != self.device or rows.weight.dtype != self.dtype:
            rows = self._rows = SLICES.slice(self, self.target_ids())
        return rows

    def target_ids(self) -> torch.Tensor:
        """Returns the target id of each of the head's ids, `[Vd]`."""
        return self.draft_to_target(torch.arange(int(self.config.draft_vocab_size or 0), device=self.device))

    def forward(
        self,
        input_ids: torch.Tensor,
        features: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: HeadCache | None = None,
    ) -> EagleHeadOutput:
        """Fuses target features, runs one step and scores: `logits(step(input_ids, fuse(features), ...))`.

        Args:
            input_ids: `[B, T]`, the token after each feature's own.
            features: `[B, T, num_features * H_t]`, target features.
            position_ids: As in `step`.
            attention_mask: As in `step`.
            cache: As in `step`.

        Returns:
            Logits `[B, T, Vd]` and the predicted features `[B, T, H]`.
        """
        hidden = self.step(input_ids, self.fuse(features), position_ids, attention_mask, cache)
        return EagleHeadOutput(logits=self.logits(hidden), hidden=hidden)


AutoConfig.register(EagleHeadConfig.model_type, EagleHeadConfig)
AutoModel.register(EagleHeadConfig, EagleHead)
