# SPDX-License-Identifier: Apache-2.0
"""A runner for decoders that attend to an encoder's outputs: Whisper, T5, BART and their kind.

The decoder's own keys and values are rolled back like any other's; those of the encoder's outputs are computed in the
first pass and stay. Rows run in step: most of these decoders count positions by their cache's columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from ..errors import UncheckableError
from ..exactness.context import Context, Prompt
from ..telemetry.counters import LevelStats
from .callers_cache import added_layers, write_cache
from .columns import positions_of
from .encoded import Encoded, is_encoder_decoder
from .forwarding import Forwarding
from .in_step import ids_of_text
from .release import forward_arguments, inner_model
from .runner import ModelRunner


@dataclass(frozen=True)
class DecoderOutput:
    """What a decoder said, by the names that models without an encoder use.

    Attributes:
        logits: `[B, F, V]` or its last columns.
        hidden_states, attentions, cross_attentions: by layer, where they were asked for.
    """

    logits: torch.Tensor
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None


_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class SeqToSeqRunner(ModelRunner):
    """A `ModelRunner` whose model is called with an encoder's outputs.

    Args:
        model, name, device, options: see `ModelRunner`.
        encoded: what its decoder attends to.
    """

    cuts = False  # an encoder's model is no copy that lends, and its trees are not checked

    def __init__(
        self, model: Any, name: str, device: torch.device | None = None, *, encoded: Encoded, **options: Any
    ) -> None:
        super().__init__(model, name, device, **options)
        # What the class's own method would do is done here: it knows the decoder's arguments by their own names.
        self._forwarding = Forwarding(model, asks=False)
        self.encoded = encoded
        self.crossed: Cache = DynamicCache() if encoded.crossed is None else encoded.crossed
        self._own_encoder = is_encoder_decoder(model)
        prefix = "decoder_" if self._own_encoder else ""
        self._names = {name: f"{prefix}{name}" for name in ("input_ids", "attention_mask", "position_ids")}
        self._numbers = self._names["position_ids"] in forward_arguments(model)
        self.in_step = encoded.states.shape[0] > 1
        if self.in_step:
            self.note = f"{name} attends to an encoder: rows run in step, those ahead are read again"

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        self.encoded = self.encoded.select(rows)
        if len(self.crossed.layers):
            self.crossed.batch_select_indices(torch.tensor(rows))

    def _inputs(
        self, context: Context, sequences: list[list[int]], keep: list[int], past: int, fed: int
    ) -> dict[str, Any]:
        made = super()._inputs(context, sequences, keep, past, fed)
        if made.get("attention_mask") is None:
            made.pop("attention_mask", None)
        elif self._numbers and "position_ids" not in made:
            made["position_ids"] = positions_of(context, sequences, fed).to(self.model_device)
        made = {self._names.get(name, name): value for name, value in made.items()}
        if self._cache_argument is not None and self.use_cache:
            made[self._cache_argument] = EncoderDecoderCache(self.cache, self.crossed)
        made["encoder_outputs"] = self.encoded.outputs
        if self._own_encoder and self.encoded.mask is not None:
            made["attention_mask"] = self.encoded.mask
        return made | self.encoded.always

    def _call(self, inputs: dict[str, Any], logits: int, past: int, stats: LevelStats, grown: list[int]) -> Any:
        output = super()._call(inputs, logits, past, stats, grown)
        prefix = "decoder_" if self._own_encoder else ""
        names = (f"{prefix}hidden_states", f"{prefix}attentions", "cross_attentions")
        return DecoderOutput(output.logits, *(getattr(output, name, None) for name in names))

    def _recover(self, past: int) -> None:
        super()._recover(past)
        self.crossed = DynamicCache()


def write_back(runner: ModelRunner, cache: Any, start: int) -> None:
    """Extend the cache that generate() prepared, or the caller brought, by what a runner's holds from a column on."""
    if isinstance(runner, SeqToSeqRunner):
        write_cache(runner.plain_cache(), cache.self_attention_cache, start)
    else:
        held = runner.plain_cache()
        write_cache(held, cache, start, added_layers(runner.model, cache, len(held.layers)))
    for index, layer in enumerate(runner.crossed.layers if isinstance(runner, SeqToSeqRunner) else ()):
        if not cache.is_updated.get(index):
            cache.cross_attention_cache.update(layer.keys, layer.values, index)
            cache.is_updated[index] = True


def runner_over(model: Any, name: str, device: torch.device | None, encoded: Encoded, **options: Any) -> SeqToSeqRunner:
    """The runner of a decoder that attends to an encoder's outputs.

    Raises:
        UncheckableError: several ids after a cache are not read as in one text, so that no draft can be checked.
    """
    kind = inner_model(model)
    known = _known.get(kind)
    found = _reads_on(model, encoded) if known is None else known
    if not model.training:  # dropout says something else every time
        _known[kind] = found
    if not found:
        raise UncheckableError(
            f"{name} ({type(kind).__name__}) does not read several tokens after a cache as it reads them in one text, "
            "so drafts cannot be checked with it; leave it out.",
            name,
        )
    return SeqToSeqRunner(model, name, device, encoded=encoded, **options)


@torch.no_grad()
def _reads_on(model: Any, encoded: Encoded) -> bool:
    """Whether a text read in pieces, part of it twice, gets the logits that it gets at once."""
    ids = ids_of_text(model)[0]
    devices = [encoded.states.device] if encoded.states.device.type == "cuda" else []
    nothing, stats = Prompt(0, None, torch.full((1, 1), -1)), LevelStats("probe", 0)
    with torch.random.fork_rng(devices=devices):
        try:
            pieces, whole = (SeqToSeqRunner(model, "the probe", encoded=encoded.select([0])) for _ in range(2))
            for end in (len(ids) // 3, len(ids)):
                found = pieces.run(Context([ids[:end]], nothing), [ids[end : end + 2]], stats).logits[:, 0]
            wanted = whole.run(Context([ids], nothing), [[]], stats).logits[:, 0]
        except Exception:
            return False
    coarse = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((found - wanted).abs().max() <= coarse * wanted.abs().max())
