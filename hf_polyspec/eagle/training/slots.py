# SPDX-License-Identifier: Apache-2.0
"""Continuous batching for self-generation: fixed slots, each at its own length.

Every row of the batch (a slot) owns one row of the key/value buffers and writes at its own length, so a finished
text can be replaced at once and the batch stays full. Rows never see each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_polyspec.eagle.attention import sdpa
from hf_polyspec.eagle.training.kept_states import joined_states
from hf_polyspec.host.attention import attention_name, register_attention, sdpa_attention_forward
from hf_polyspec.host.modeling import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from hf_polyspec.host.release import cache_of, with_cache


class SlotLayer(CacheLayerMixin):
    """One layer's preallocated keys and values, written at a different column in every row.

    Args:
        slots: number of rows of the buffer.
        capacity: columns a row can hold.
        dtype: what the buffers hold, or None for what the model computes.
    """

    is_sliding = False

    def __init__(self, slots: int, capacity: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.slots = slots
        self.capacity = capacity
        self.stored = dtype
        self.rows: torch.Tensor | None = None
        self.columns: torch.Tensor | None = None
        self.visible = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the buffers from the shape of the first keys and values."""
        for name, states in (("keys", key_states), ("values", value_states)):
            _, heads, _, width = states.shape
            # [slots, heads, capacity, width]; zeros, because a masked NaN would still poison the softmax
            shape = (self.slots, heads, self.capacity, width)
            setattr(self, name, states.new_zeros(shape, dtype=self.stored or states.dtype))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new columns and returns what the queries may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is None or self.values is None or self.rows is None or self.columns is None:
            raise RuntimeError("a SlotLayer was used before its slots were chosen")
        # rows [R, 1] and columns [R, T] pick [R, T, heads, width] of the buffer
        self.keys[self.rows, :, self.columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[self.rows, :, self.columns] = value_states.transpose(1, 2).to(self.values.dtype)
        if self.visible == 0:
            return key_states, value_states
        return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys the next update returns."""
        return (self.visible or query_length), 0

    def get_seq_length(self) -> int:
        """Columns visible to the next step."""
        return self.visible

    def get_max_length(self) -> int:
        """Columns a row can hold."""
        return self.capacity


def compact_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over keys and values kept in a narrower dtype than the model computes in.

    Steps of one token are memory traffic: queries that share a key head are put side by side, so that each key and
    value is read once, and half as wide.

    Args:
        module: the attention layer.
        query: `[B, H, T, D]`.
        key: `[B, G, L, D]`, H a multiple of G.
        value: `[B, G, L, D]`.
        attention_mask: `[B, 1, T, L]`, True where a query may look.
        scaling: of the scores.

    Returns:
        `[B, T, H, D]` in the dtype of `query`, and no weights.
    """
    if key.dtype == query.dtype or attention_mask is None:
        found, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return found, None
    rows, heads, steps, width = query.shape
    shared = heads // key.shape[1]
    grouped = query.to(key.dtype).reshape(rows, -1, shared * steps, width)  # [B, G, H/G * T, D]
    mask = attention_mask.repeat(1, 1, shared, 1)  # [B, 1, H/G * T, L]
    mixed = sdpa(grouped, key, value, mask, causal=False, scale=scaling)
    return mixed.to(query.dtype).reshape(rows, heads, steps, width).transpose(1, 2), None


COMPACT_ATTENTION = "polyspec_compact"
register_attention(COMPACT_ATTENTION, compact_attention)


class SlotBatch:
    """A model with a fixed number of slots that can be filled, stepped and refilled independently.

    Args:
        model: any causal LM whose layers all use full attention and which accepts ready 4-D masks.
        slots: rows of the batch.
        capacity: tokens a row can hold, prompt and answer together.
        cache_dtype: what keys and values are kept in, or None for the model's own. Another one needs a model that
            uses `compact_attention`.
        watched: indices into `hidden_states` that a head reads, or None to keep no states.

    Attributes:
        seen: `[R, T, F + H_t]`, of the rows and tokens that were fed last, what is watched and the state that the
            lm_head reads, in half precision on the CPU; None where nothing is kept.

    Raises:
        ValueError: the model has sliding, chunked or recurrent layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        capacity: int,
        cache_dtype: torch.dtype | None = None,
        watched: Sequence[int] | None = None,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__}
        if kinds:
            raise ValueError(
                f"continuous batching needs full attention in every layer, and {type(model).__name__} keeps "
                f"{', '.join(sorted(kinds))}; use DrainedBatch"
            )
        self.model = model
        self.slots = slots
        self.capacity = capacity
        self.device = model.device
        self.layers = [SlotLayer(slots, capacity, cache_dtype) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=self.layers)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.running = torch.zeros(slots, dtype=torch.bool, device=self.device)
        self.watched = watched
        self.seen: torch.Tensor | None = None

    @property
    def refillable(self) -> bool:
        """Whether a slot may be filled while others are still running."""
        return True

    def fill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Starts new texts in the given slots, ready for a step with each prompt's last token.

        Args:
            rows: slots to overwrite.
            prompts: token ids, one non-empty sequence for each slot. The last id of each is left for `step`.
        """
        check_prompts(prompts, self.capacity)
        which = torch.tensor(rows, device=self.device)
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        self.lengths[which] = lengths
        self.running[which] = True
        self.seen = None
        longest = int(lengths.max())
        if longest == 0:
            return
        # [R, T], padded on the right: causal attention keeps the padding invisible to the real tokens
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        for index, prompt in enumerate(prompts):
            ids[index, : len(prompt) - 1] = torch.tensor(prompt[:-1], device=self.device)
        positions = torch.arange(longest, device=self.device).expand(len(prompts), longest)
        mask = torch.ones(longest, longest, dtype=torch.bool, device=self.device).tril()
        self._aim(which[:, None], positions, visible=0)
        with torch.inference_mode():
            output = self.model.base_model(
                input_ids=ids,
                attention_mask=mask.expand(len(prompts), 1, longest, longest),
                position_ids=positions,
                **with_cache(self.model, self.cache),
                use_cache=True,
                **self._wishes(),
            )
        self._look(output)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token to every slot.

        Args:
            tokens: `[slots]`; idle slots may be given any id.

        Returns:
            Logits after the token, `[slots, V]`.
        """
        rows = torch.arange(self.slots, device=self.device)[:, None]
        columns = self.lengths[:, None].clone()  # [B, 1]
        visible = int(self.lengths.max()) + 1
        self._aim(rows, columns, visible)
        # [B, 1, 1, visible]: a row sees what it has written, this token included
        mask = (torch.arange(visible, device=self.device) <= columns)[:, None, None]
        with torch.inference_mode():
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=columns,
                **with_cache(self.model, self.cache),
                use_cache=True,
                logits_to_keep=1,
                **self._wishes(),
            )
        self._look(output)
        self.lengths += self.running
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def release(self, row: int) -> None:
        """Marks a slot idle, so that it costs as little as possible until it is filled again."""
        self.lengths[row] = 0
        self.running[row] = False

    def _wishes(self) -> dict[str, bool]:
        return {} if self.watched is None else {"output_hidden_states": True}

    def _look(self, output: Any) -> None:
        if self.watched is not None:
            self.seen = joined_states(output.hidden_states, self.watched)

    def _aim(self, rows: torch.Tensor, columns: torch.Tensor, visible: int) -> None:
        for layer in self.layers:
            layer.rows, layer.columns, layer.visible = rows, columns, visible


class DrainedBatch:
    """The same interface for models of every other kind: refilled only once all its texts are finished.

    Args:
        model: any causal LM.
        slots: rows of the batch.
        capacity: tokens a row can hold, prompt and answer together.
    """

    def __init__(self, model: PreTrainedModel, slots: int, capacity: int) -> None:
        self.model = model
        self.slots = slots
        self.capacity = capacity
        self.device = model.device
        self.order: list[int] = []
        self.cache: Any = None
        self.pending: list[list[int]] = []
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)
        self.seen: torch.Tensor | None = None

    @property
    def refillable(self) -> bool:
        """Whether a slot may be filled while others are still running."""
        return False

    def fill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Starts a new batch, ready for a step with each prompt's last token; see `SlotBatch.fill`."""
        check_prompts(prompts, self.capacity)
        self.order = list(rows)
        self.pending = [list(prompt) for prompt in prompts]
        self.cache = None

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds one token to every slot; see `SlotBatch.step`."""
        order = torch.tensor(self.order, device=self.device)
        ids = tokens[order][:, None]  # [R, 1]
        if self.pending:
            ids = self._start(ids)  # [R, T]
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(order), 1)], dim=1)
        # real tokens count from 0 in every row, whatever the padding
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        known = inspect.signature(self.model.forward).parameters
        wanted = {"position_ids": positions, "logits_to_keep": 1}
        with torch.inference_mode():
            output = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                **with_cache(self.model, self.cache),
                use_cache=True,
                **{name: value for name, value in wanted.items() if name in known},
            )
        self.cache = cache_of(output)
        picked = output.logits[:, -1]  # [R, V]
        logits: torch.Tensor = picked.new_zeros(self.slots, picked.shape[-1])
        logits[order] = picked
        return logits

    def release(self, row: int) -> None:
        """Nothing to do: the row runs along until the batch is drained."""

    def _start(self, last: torch.Tensor) -> torch.Tensor:
        """The whole prompts with the fed tokens at their end, `[R, T]`, padded on the left."""
        longest = max(len(prompt) for prompt in self.pending)
        ids = torch.zeros(len(self.pending), longest, dtype=torch.long, device=self.device)
        self.mask = torch.zeros_like(ids)
        for index, prompt in enumerate(self.pending):
            ids[index, longest - len(prompt) :] = torch.tensor(prompt, device=self.device)
            self.mask[index, longest - len(prompt) :] = 1
        ids[:, -1:] = last
        self.pending = []
        return ids


def check_prompts(prompts: Sequence[Sequence[int]], capacity: int) -> None:
    """Refuses prompts that a batch cannot hold.

    Args:
        prompts: token ids of each prompt.
        capacity: tokens a row can hold.

    Raises:
        ValueError: a prompt is empty or leaves no room for an answer.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no tokens, so there is nothing to continue")
    longest = max(len(prompt) for prompt in prompts)
    if longest >= capacity:
        raise ValueError(f"a prompt of {longest} tokens does not fit in rows of {capacity} tokens")


def open_batch(
    model: PreTrainedModel, slots: int, capacity: int, compact: bool = False, watched: Sequence[int] | None = None
) -> SlotBatch | DrainedBatch:
    """Chooses the batch a model can run in.

    Args:
        model: the causal LM that writes.
        slots: rows of the batch.
        capacity: tokens a row can hold, prompt and answer together.
        compact: keep keys and values in bfloat16 where that works; changes the model's attention: for copies only.
        watched: as for `SlotBatch`.

    Raises:
        ValueError: states are to be kept of a model that cannot run in slots.
    """
    if compact and model.dtype == torch.float32 and serves_slots(model):
        before = attention_name(model.config)
        model.set_attn_implementation(COMPACT_ATTENTION)
        # tried in a wider dtype, which takes the same way without the rounding that would blur the answer
        if serves_slots(model, torch.float64):
            return SlotBatch(model, slots, capacity, torch.bfloat16, watched)
        model.set_attn_implementation(before)
    if serves_slots(model):
        return SlotBatch(model, slots, capacity, watched=watched)
    if watched is not None:
        raise cannot_keep(model)
    return DrainedBatch(model, slots, capacity)


def cannot_keep(model: PreTrainedModel) -> ValueError:
    """What to say where states are to be kept of a model that cannot run in slots."""
    return ValueError(f"keep_states needs a model that can run in slots, and {type(model).__name__} cannot")


def serves_slots(model: PreTrainedModel, cache_dtype: torch.dtype | None = None) -> bool:
    """Whether a model computes the same in slots as alone, found out by trying two short texts.

    Some architectures read positions out of a 2-D mask, or keep more than keys and values; asking them is surer than
    a list of names.

    Args:
        model: a causal LM.
        cache_dtype: as for `SlotBatch`.
    """
    texts = [[1, 2, 3, 4, 5], [6, 7]]
    try:
        batch = SlotBatch(model, len(texts), 8, cache_dtype)
        batch.fill([0, 1], texts)
        together = batch.step(torch.tensor([text[-1] for text in texts], device=model.device)).float()
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        return False
    with torch.inference_mode():
        alone = [model(input_ids=torch.tensor([text], device=model.device)).logits[0, -1] for text in texts]
    apart = torch.stack(alone).float()
    # half precision rounds the two a little differently; a misread position is far off
    return bool((together - apart).norm() < 0.05 * apart.norm())
