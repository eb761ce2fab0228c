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
from .placements import AUTO, Placed, Placing
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
        placing: in which processes they can run.
    """

    assistants: list[Any]
    options: PolySpecOptions
    vocabularies: list[Vocabularies | None]
    named: dict[str, Any]
    chosen_here: bool
    placing: Placing


def checked(
    model: Any,
    config: GenerationConfig,
    assistants: Any,
    plan: Any,
    named: dict[str, Any],
    tokenizers: tuple[Any, Any],
    ranks: Ranks,
    rows: int = 1,
) -> Checked:
    """Read what was passed and what stands in a generation config.

    Args:
        model: the target; config: as generate() prepared it.
        assistants, plan: as they were passed; named: the options that were passed, by name.
        tokenizers: the target's and the assistants'.
        ranks: the processes that hold the target; rows: of the batch.

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
    given = [] if chosen_here else assistants
    wanted = named.get("polyspec_placement") or getattr(config, "polyspec_placement", None) or AUTO
    sizes = {name: value for name, value in named.items() if name != "polyspec_seed"}
    placing = Placing(model, given, wanted, (repr(sizes), repr(plan), rows.bit_length()), ranks)
    assistants = [] if chosen_here else members(model, given, placing.placed.places)
    if plan is not None:
        every = assistants
        assistants, sizes = resolve_plan(plan, model, assistants, named)
        named = {**named, **sizes}
        placing.narrow(every, assistants)
    options = PolySpecOptions.read(named, config)
    check_options(config)
    if options.polyspec_bias_budget and not config.do_sample:
        raise ValueError(
            "polyspec_bias_budget needs do_sample=True: greedy decoding has no probabilities to trade, "
            "and is exact at any budget; leave it out."
        )
    if placing.told:
        made_as = placing.placed.places
        placing.find(assistants, options, bool(config.do_sample))
        if placing.placed.places != made_as and plan is None:
            assistants = members(model, given, placing.placed.places)
    found, pairs = located(model, assistants, tokenizers, ranks, placing.placed)
    check_window(model, config.max_length)
    return Checked(found, options, pairs, named, chosen_here, placing)


def located(
    model: Any, assistants: Any, tokenizers: tuple[Any, Any], ranks: Ranks, placed: Placed
) -> tuple[list[Any], list[Vocabularies | None]]:
    """The members that run in this process, checked, and what stands between each and the target; collective.

    Args:
        model: the target; assistants: the members; tokenizers: the target's and theirs.
        ranks: the processes that hold the target; placed: where members run.

    Raises:
        ValueError, TypeError: what cannot be served.
    """
    pairs = vocabularies(model, assistants, *tokenizers)
    found = here(model, assistants, ranks, placed.everywhere)
    if pairs and not ranks.leads:
        pairs = [None if i >= len(assistants) or one is not assistants[i] else pairs[i] for i, one in enumerate(found)]
    return checked_assistants(model, found, pairs), pairs
