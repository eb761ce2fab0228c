# SPDX-License-Identifier: Apache-2.0
"""`generate_batch`: an engine for one list of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

from ..generation.options import PolySpecOptions
from ..telemetry.stats import PolySpecStats
from .engine import DEFAULT_SLOTS, Engine
from .request import Handle


@dataclass(frozen=True)
class BatchAnswer:
    """What became of one prompt; the first five are named as transformers' `generate_batch` names them.

    Attributes:
        request_id: "req_0" for the first prompt, and so on.
        prompt_ids: its ids; generated_tokens: the new ones, those that were there before it failed included.
        error: what it failed with, in words; None where it did not.
        logprobs: empty.
        exception: what it failed with, for whoever wants to raise it.
        seed: what it was drawn with, None for a greedy text.
        polyspec: what every level did for it.
    """

    request_id: str
    prompt_ids: list[int]
    generated_tokens: list[int]
    error: str | None = None
    logprobs: list[float] = field(default_factory=list)
    exception: BaseException | None = None
    seed: int | None = None
    polyspec: PolySpecStats | None = None


def generate_batch(
    model: Any,
    inputs: Sequence[Any],
    generation_config: GenerationConfig | None = None,
    *,
    assistant_models: Any = (),
    slots: int = DEFAULT_SLOTS,
    max_total_tokens: int | None = None,
    tokenizer: Any = None,
    seeds: int | Sequence[int | None] | None = None,
    **kwargs: Any,
) -> dict[str, BatchAnswer]:
    """Generate for many prompts of any length, `slots` of them at a time; one that ends makes room for the next.

    Each text is what `model.generate()` writes for its prompt alone. A prompt that fails has an `error`, and the others
    go on; what cannot be served is refused before anything is generated.

    Args:
        model: the target.
        inputs: prompts, as `Engine.submit` takes them: lists of ids of different lengths, or text with a tokenizer.
        generation_config: for all of them.
        assistant_models: see `Engine`.
        slots: see `Engine`.
        max_total_tokens: see `Engine`.
        tokenizer: see `Engine`.
        seeds: of sampled texts: one for each prompt; or a number, and prompt i has that number plus i. None: drawn from
            torch's default generator, one after another.
        kwargs: options of `generate()` for all prompts, and of the chain.

    Returns:
        By request id, in the order of the prompts.

    Raises:
        TypeError, ValueError: in one sentence.
    """
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
        raise TypeError(f"inputs must be a list of prompts, got {type(inputs).__name__}.")
    prompts = list(inputs)
    drawn_with = _seeds(seeds, len(prompts))
    names = [name for name in PolySpecOptions.names() if name in kwargs and name != "polyspec_seed"]
    chain = {name: kwargs.pop(name) for name in names}
    engine = Engine(
        model,
        assistant_models,
        slots=slots,
        queue=max(1, len(prompts)),
        max_total_tokens=max_total_tokens,
        tokenizer=tokenizer,
        **chain,
    )
    with engine:
        handles = [
            engine.submit(prompt, generation_config, seed=seed, **kwargs)
            for prompt, seed in zip(prompts, drawn_with, strict=True)
        ]
    return {f"req_{i}": _answer(f"req_{i}", handle) for i, handle in enumerate(handles)}


def _answer(name: str, handle: Handle) -> BatchAnswer:
    error = handle.exception()
    told = None if error is None else str(error)
    ids, seed, stats = handle.prompt_ids, handle.seed, handle.polyspec
    return BatchAnswer(name, ids, handle.tokens, told, exception=error, seed=seed, polyspec=stats)


def _seeds(seeds: int | Sequence[int | None] | None, count: int) -> list[int | None]:
    if seeds is None or isinstance(seeds, int):
        return [None if seeds is None else seeds + i for i in range(count)]
    if len(seeds) != count:
        raise ValueError(f"seeds has {len(seeds)} numbers, and there are {count} prompts; give one for each.")
    return list(seeds)
