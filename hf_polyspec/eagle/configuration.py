# SPDX-License-Identifier: Apache-2.0
"""The configuration of an EAGLE draft head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hf_polyspec.defaults import require_temperature

ALGORITHMS = ("eagle1", "eagle3")

# EAGLE-1 eats the hidden state that the target's lm_head eats; in `hidden_states` that is the last entry.
LAST_HIDDEN_STATE = -1

# Official heads without a base were trained with this one, whatever their target's own base is.
DEFAULT_ROPE_THETA = 10_000.0

# Fields that list ids of the vocabulary by the thousand: a saved head holds them as tensors beside its weights.
ID_LISTS = ("frequent_tokens",)

_WITHOUT_LISTS: ContextVar[bool] = ContextVar("_WITHOUT_LISTS", default=False)

# Variants that change what a head computes in ways this implementation does not: better refused than misread.
_UNSUPPORTED_SWITCHES = {
    "mask_hidden": "parallel drafting (P-EAGLE)",
    "mask_token_id": "parallel drafting (P-EAGLE)",
    "parallel_draft_step": "parallel drafting",
    "use_mtp_layernorm": "multi-token-prediction norms",
}


@contextmanager
def without_id_lists() -> Iterator[None]:
    """While it lasts, configs are written without their lists of ids, which whoever writes them puts elsewhere."""
    before = _WITHOUT_LISTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_LISTS.reset(before)


class EagleHeadConfig(PreTrainedConfig):
    """Describes an EAGLE-1/2 or EAGLE-3 draft head completely, so that no key of a checkpoint is guessed.

    The formulas are those of EAGLE (arXiv 2401.15077), EAGLE-2 (arXiv 2406.16858, the same weights) and
    EAGLE-3 (arXiv 2503.01840). Everything below is a fact about the weights; how a tree is drafted from them
    is not part of it.

    Attributes:
        algorithm: `"eagle1"` (EAGLE-1 and EAGLE-2) or `"eagle3"`.
        vocab_size: Rows of the target's embedding, V.
        draft_vocab_size: Ids the head scores, Vd; `None` means all V.
        hidden_size: Width of the head, H.
        target_hidden_size: Width of one target feature, H_t; `None` means H.
        feature_layer_ids: Indices into the target's `hidden_states` (0 is the embedding output, -1 the state
            the lm_head reads), in the order in which they are concatenated; `None` derives the algorithm's
            default from the depth of the target.
        unsettled_layer_ids: The layer numbers of a published checkpoint whose convention `feature_layer_ids` guesses; a
            target in which the guess cannot be right settles it. `None` where nothing was guessed.
        num_features: How many target states are concatenated per position.
        intermediate_size: Width of the MLP, I.
        num_hidden_layers: Decoder layers of the head (one in every published head).
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; `None` means one per query head.
        head_dim: Width of one attention head; `None` means H / num_attention_heads.
        hidden_act: Activation of the MLP.
        rms_norm_eps: Epsilon of every norm.
        max_position_embeddings: Length the head was trained for; longer contexts get exact angles, too.
        rope_parameters: Rotary settings; without a `rope_theta` the base is 10000, never the target's.
        fc_bias: Whether the fusing projection has a bias.
        attention_bias: Whether the query, key and value projections have biases.
        attention_out_bias: Whether the output projection has a bias.
        mlp_bias: Whether the MLP projections have biases.
        sliding_window: How many of the last positions attention sees, itself included; `None` means all.
        qk_norm: Whether queries and keys are normalised per head (Qwen3-type layers).
        has_fc: Whether target features pass through a projection before the first layer (always in EAGLE-1).
        embed_norm: EAGLE-1 only: a norm on the embedding before the fusing projection.
        fused_norm: EAGLE-1 only: a norm on the fused vector before attention (the residual stays un-normed).
        final_norm: A norm between the last layer and the lm_head.
        norm_before_residual: EAGLE-3 only: the attention residual is the normed feature.
        norm_before_fc: EAGLE-3 only: one norm over the concatenated features.
        fc_norm: EAGLE-3 only: one norm per feature; excludes `norm_before_fc`.
        norm_output: The final norm is applied to what feeds the next draft step as well.
        own_embedding: The checkpoint brings its own embedding instead of the target's.
        own_lm_head: The checkpoint brings its own lm_head instead of the target's.
        initializer_range: Standard deviation of fresh weights.
        frequent_tokens: Ids that the target's own texts use, the most frequent first (`rank_tokens`): which rows are
            drafted from where only some are wanted. `None` where nobody counted. A saved head holds them beside its
            weights, not in its config.json.
        draft_temperature: What the head draws, it draws from its law to the power of one over this, normalised.

    Raises:
        ValueError: If the settings contradict each other or name a variant that cannot be computed here.
    """

    model_type: ClassVar[str] = "polyspec_eagle"

    algorithm: str = "eagle3"
    vocab_size: int = 32000
    draft_vocab_size: int | None = None
    hidden_size: int = 4096
    target_hidden_size: int | None = None
    feature_layer_ids: list[int] | None = None
    unsettled_layer_ids: list[int] | None = None
    num_features: int | None = None
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    fc_bias: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    qk_norm: bool = False
    has_fc: bool = True
    embed_norm: bool = False
    fused_norm: bool = False
    final_norm: bool | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    own_embedding: bool = False
    own_lm_head: bool | None = None
    initializer_range: float = 0.02
    frequent_tokens: list[int] | None = None
    draft_temperature: float = 1.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __init__(self, **kwargs: Any) -> None:
        for name in self.field_names():
            setattr(self, name, kwargs.pop(name, getattr(type(self), name)))
        self._derive_defaults()
        self._refuse_switches(kwargs)
        self._refuse_contradictions()
        super().__init__(**kwargs)

    @classmethod
    def field_names(cls) -> list[str]:
        """Returns the names of the fields that describe a head."""
        return [name for name, kind in EagleHeadConfig.__annotations__.items() if "ClassVar" not in str(kind)]

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields as they are written to config.json, where lists of ids stay out of it if a head is saved."""
        values: dict[str, Any] = super().to_diff_dict()
        return {name: value for name, value in values.items() if not (_WITHOUT_LISTS.get() and name in ID_LISTS)}

    def _derive_defaults(self) -> None:
        eagle3 = self.algorithm == "eagle3"
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.final_norm is None:
            self.final_norm = eagle3
        if self.own_lm_head is None:
            self.own_lm_head = eagle3
        if self.num_features is None:
            listed = len(self.feature_layer_ids) if self.feature_layer_ids else 3
            self.num_features = listed if eagle3 and self.has_fc else 1
        # transformers completes the settings in place
        self.rope_parameters = dict(self.rope_parameters or {}) or None

    @property
    def feature_size(self) -> int:
        """Width of the concatenated target features of one position, num_features * H_t."""
        return (self.num_features or 1) * (self.target_hidden_size or self.hidden_size)

    @property
    def maps_vocabulary(self) -> bool:
        """Whether the head scores fewer ids than the target has, so that `d2t` is needed."""
        return self.draft_vocab_size != self.vocab_size

    def _refuse_switches(self, given: dict[str, Any]) -> None:
        for name, meaning in _UNSUPPORTED_SWITCHES.items():
            value = given.get(name)
            if value is not None and value is not False:
                raise ValueError(f"The head asks for {meaning} (`{name}: {value}`), which is not supported.")

    def _refuse_contradictions(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {self.algorithm!r}.")
        require_temperature("draft_temperature", self.draft_temperature)
        if self.algorithm == "eagle1":
            self._refuse_for_eagle1()
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("`norm_before_fc` and `fc_norm` exclude each other.")
        if (self.norm_before_fc or self.fc_norm) and not self.has_fc:
            raise ValueError("`norm_before_fc` and `fc_norm` need a fusing projection (`has_fc`).")
        if self.norm_output and not self.final_norm:
            raise ValueError("`norm_output` needs a final norm (`final_norm`).")
        if self.feature_layer_ids is not None and len(self.feature_layer_ids) != self.num_features:
            listed = list(self.feature_layer_ids)
            raise ValueError(f"feature_layer_ids {listed} do not match num_features={self.num_features}.")
        if not self.has_fc and self.feature_size != self.hidden_size:
            raise ValueError(
                f"Without a fusing projection the features ({self.feature_size} wide) must be as wide as the "
                f"head ({self.hidden_size})."
            )
        if (self.draft_vocab_size or 0) > self.vocab_size:
            raise ValueError(
                f"draft_vocab_size ({self.draft_vocab_size}) is larger than vocab_size ({self.vocab_size})."
            )
        self._refuse_shapes_and_rope()

    def _refuse_for_eagle1(self) -> None:
        for name in ("norm_before_residual", "norm_before_fc", "fc_norm"):
            if getattr(self, name):
                raise ValueError(f"`{name}` belongs to EAGLE-3 heads; this head is EAGLE-1.")
        if not self.has_fc:
            raise ValueError("An EAGLE-1 head always has a fusing projection (`has_fc`).")
        if self.target_hidden_size != self.hidden_size or self.num_features != 1:
            raise ValueError("An EAGLE-1 head reads one feature, of its own width.")

    def _refuse_shapes_and_rope(self) -> None:
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be positive or None, got {self.sliding_window}.")
        rope = self.rope_parameters or {}
        turned = int((self.head_dim or 0) * (rope.get("partial_rotary_factor") or 1.0))
        if turned < 2 or turned % 2:
            raise ValueError(f"Rotary positions turn an even number of values per head, not {turned}.")
