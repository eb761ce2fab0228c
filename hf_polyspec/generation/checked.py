# SPDX-License-Identifier: Apache-2.0
"""What a caller said of a chain, read and checked before anything is computed: members, plan, options, vocabularies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from ..host.compatibility import check_options
from ..host.peculiar import check_window
from ..host.ranks import Ranks, Spread
from ..host.vocabularies import Vocabularies
from .chain import checked_assistants
from .meeting import here
from .members import leaves_choice, members
from .options import PolySpecOptions
from .plan import resolve_plan
from .tokenizers import vocabularies


@dataclass(frozen=True)
class Checked:
    """A chain that can be built.

    Attributes:
        assistants: the members that run in this process.
        options: the caller's.
        vocabularies: for every member the two it stands between; empty where all share the target's.
        named: the options that were passed, by name, with what a plan says of them.
        chosen_here: whether the members are yet to be chosen ("auto").
    """

    assistants: list[Any]
    options: PolySpecOptions
    vocabularies: list[Vocabularies | None]
    named: dict[str, Any]
    chosen_here: bool


def checked(
    model: Any,
    config: GenerationConfig,
    assistants: Any,
    plan: Any,
    named: dict[str, Any],
    tokenizers: tuple[Any, Any],
    ranks: Ranks,
) -> Checked:
    """Read what was passed and what stands in a generation config.

    Args:
        model: the target; config: as generate() prepared it.
        assistants, plan: as they were passed; named: the options that were passed, by name.
        tokenizers: the target's and the assistants'.
        ranks: the processes that hold the target.

    Raises:
        ValueError, TypeError: what cannot be served.
    """
    # Set in a generation config, where no door has read them yet.
    assistants = getattr(config, "assistant_models", None) if assistants is None else assistants
    plan = getattr(config, "polyspec_plan", None) if plan is None else plan
    chosen_here = leaves_choice(assistants, plan)
    if chosen_here and isinstance(ranks, Spread):
        raise ValueError(
            'assistant_models="auto" runs as many passes as pay, and the weights of the target '
            f"({type(model).__name__}) are spread over processes (FSDP2), which all have to take part; name the "
            "assistants."
        )
    assistants = [] if chosen_here else members(model, assistants)
    if plan is not None:
        assistants, sizes = resolve_plan(plan, model, assistants, named)
        named = {**named, **sizes}
    options = PolySpecOptions.read(named, config)
    check_options(config)
    if options.polyspec_bias_budget and not config.do_sample:
        raise ValueError(
            "polyspec_bias_budget needs do_sample=True: greedy decoding has no probabilities to trade, "
            "and is exact at any budget; leave it out."
        )
    pairs = vocabularies(model, assistants, *tokenizers)
    found = here(model, assistants, ranks)
    if pairs and not ranks.leads:
        pairs = [None if i >= len(assistants) or one is not assistants[i] else pairs[i] for i, one in enumerate(found)]
    found = checked_assistants(model, found, pairs)
    check_window(model, config.max_length)
    return Checked(found, options, pairs, named, chosen_here)
