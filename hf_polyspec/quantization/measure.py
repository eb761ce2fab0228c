# SPDX-License-Identifier: Apache-2.0
"""What a cheaper copy of a model is worth: how often it would be believed, and how much faster it is here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.release import with_cache
from hf_polyspec.host.waiting import wait_for


@dataclass(frozen=True)
class Comparison:
    """A copy of a model against the original, on the same text.

    Attributes:
        agreement: Mean of `sum(min(p, q))`, the chance that a token drawn from the copy is accepted by the original.
        same_choice: Share of positions where both would choose the same token greedily.
        perplexity: Of the text under the copy.
        perplexity_original: Of the text under the original.
        tokens: Positions compared.
    """

    agreement: float
    same_choice: float
    perplexity: float
    perplexity_original: float
    tokens: int


@torch.inference_mode()
def compare(
    original: nn.Module,
    quantized: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    starts: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> Comparison:
    """Compare two models' next-token distributions along given texts.

    Args:
        original: The model whose distribution counts.
        quantized: Its copy.
        tokens: Texts as ids, `[B, T]` or several `[T]`, at least two tokens each.
        starts: First token of each text to be predicted, to leave prompts out; 1 by default.
        temperature: Of both distributions, above 0.

    Returns:
        The averages over all compared positions.

    Raises:
        ValueError: No text, a text without a token to predict, or `temperature` not above 0.
    """
    texts = [text.reshape(-1) for text in tokens]
    firsts = [1] * len(texts) if starts is None else list(starts)
    if not texts or len(firsts) != len(texts) or temperature <= 0:
        raise ValueError("Comparing needs at least one text, one start for each, and a temperature above 0.")
    if any(not 0 < first < len(text) for text, first in zip(texts, firsts, strict=True)):
        raise ValueError("Each text needs a token to predict: 0 < start < length.")
    count, overlap, same = 0, 0.0, 0.0
    losses = [0.0, 0.0]
    for text, first in zip(texts, firsts, strict=True):
        p, q = (_distributions(model, text, first, temperature) for model in (original, quantized))  # [T - first, V]
        overlap += float(torch.minimum(p.exp(), q.exp()).sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        labels = text[first:, None]
        for index, log_probs in enumerate((p, q)):
            losses[index] -= float(log_probs.gather(1, labels.to(log_probs.device)).sum())
        count += len(text) - first
    reference, own = (float(torch.tensor(loss / count).exp()) for loss in losses)
    return Comparison(overlap / count, same / count, own, reference, count)


def _distributions(model: nn.Module, text: Tensor, first: int, temperature: float) -> Tensor:
    device = next(iter(model.parameters()), text).device
    logits = model(text[None].to(device)).logits[0, first - 1 : -1]  # [T - first, V]
    return torch.log_softmax(logits.float().cpu() / temperature, -1)


def agreement(original: nn.Module, quantized: nn.Module, tokens: Tensor | Iterable[Tensor]) -> float:
    """Mean of `sum(min(p, q))` over the positions of some texts: the acceptance a middle can reach.

    Args:
        original: The model that verifies.
        quantized: The model that proposes.
        tokens: Texts as ids, `[B, T]` or several `[T]`.

    Returns:
        Between 0 and 1.
    """
    return compare(original, quantized, tokens).agreement


@dataclass(frozen=True)
class SpeedRatio:
    """How many times faster than the original, at one number of tokens a pass; above 1 is faster.

    Attributes:
        rows: Tokens a pass.
        ratio: Median over rounds of (time of the original / time of the copy), measured turn by turn.
        low: Lower quartile.
        high: Upper quartile.
    """

    rows: int
    ratio: float
    low: float
    high: float


def speed_ratios(
    original: nn.Module,
    quantized: nn.Module,
    rows: Sequence[int] = (1, 4, 8, 16),
    context: int = 200,
    rounds: int = 9,
) -> list[SpeedRatio]:
    """Time both models' forward passes in turns, so that what else the machine does hits both alike.

    Args:
        original: A causal LM.
        quantized: Its copy.
        rows: Tokens a pass.
        context: Tokens already in the cache.
        rounds: Timed passes of each model and size; one more warms up.

    Returns:
        A ratio for each entry of `rows`.
    """
    results = []
    for count, times in zip(rows, pass_times((original, quantized), rows, context, rounds), strict=True):
        ratios = sorted(a / b for a, b in zip(*times, strict=True))
        quarter = len(ratios) // 4
        results.append(SpeedRatio(count, statistics.median(ratios), ratios[quarter], ratios[-1 - quarter]))
    return results


@torch.inference_mode()
def pass_times(
    models: Sequence[nn.Module], rows: Sequence[int], context: int = 200, rounds: int = 9
) -> list[list[list[float]]]:
    """Seconds of forward passes of several models in turns, batch 1, on the cache that chains use.

    Args:
        models: Causal LMs of one vocabulary.
        rows: Tokens a pass.
        context: Tokens already in the cache.
        rounds: Timed passes of each model and size; one more warms up.

    Returns:
        For each entry of `rows` and each model, the seconds of all rounds.
    """
    vocabulary = int(models[0].get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    caches = []
    for model in models:
        cache = RollbackCache()
        prompt = torch.randint(vocabulary, (1, context), generator=generator)
        model(prompt.to(_device(model)), **with_cache(model, cache))
        caches.append(cache)
    results = []
    for count in rows:
        ids = torch.randint(vocabulary, (1, count), generator=generator)
        times: list[list[float]] = [[] for _ in models]
        for _ in range(rounds + 1):
            for model, cache, taken in zip(models, caches, times, strict=True):
                taken.append(_timed_pass(model, ids, cache))
        results.append([taken[1:] for taken in times])
    return results


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _timed_pass(model: nn.Module, ids: Tensor, cache: RollbackCache) -> float:
    device = _device(model)
    here = ids.to(device)
    wait_for(device)
    begin = time.perf_counter()
    model(here, **with_cache(model, cache))
    wait_for(device)
    taken = time.perf_counter() - begin
    cache.shrink(cache.length - ids.shape[1])
    return taken
