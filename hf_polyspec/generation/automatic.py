# SPDX-License-Identifier: Apache-2.0
"""`assistant_models="auto"` in a call: which target, levels, sizes and control it runs with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from transformers import GenerationConfig

from ..control import Costs
from ..errors import refusals
from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..host.encoded import Encoded
from ..host.ranks import Ranks
from .chain import checked_members
from .meeting import here
from .options import PolySpecOptions
from .trial import tried


class Job(Protocol):
    """A call as far as "auto" changes it.

    Attributes:
        encoded: what the model's decoder attends to, where it has an encoder.
        costs: what is known of the chain, where its control is the one for that; chosen: the line on what and why.
    """

    model: Any
    config: GenerationConfig
    options: PolySpecOptions
    context: Context
    law: LawMaker
    encoded: Encoded | None
    costs: Costs | None
    chosen: str | None


def longest_row(context: Context) -> list[int]:
    """Of the rows of a call, the one with the most ids of its own: padding says nothing of a text."""
    ids, mask = context.ids, context.prompt.mask
    if mask is not None:
        rows = zip(ids, mask.tolist(), strict=True)
        ids = [[token for token, real in zip(row, told, strict=False) if real] for row, told in rows]
    return max(ids, key=len)


def choose(job: Job, named: Mapping[str, Any], ranks: Ranks) -> list[Any]:
    """The assistants that "auto" takes; the job runs on its target, with its sizes and control, from now on.

    Args:
        job: the call, checked; named: options that the caller passed, which come before those of the profile.
        ranks: the processes that share the target.

    Raises:
        ValueError: the model cannot be the target of a chain.
    """
    from ..auto import prepare  # quantisation, which most calls never need

    mode = (job.law.do_sample, job.config.temperature, job.options.couples)
    packs = job.options.polyspec_pack
    more: dict[str, Any] = {"encoded": job.encoded, "tries": tried, "ranks": ranks}
    ready = prepare(job.model, longest_row(job.context), packs=packs, mode=mode, **more)
    said = {name: value for name, value in named.items() if value is not None}
    job.options = PolySpecOptions.read({**ready.options, **said}, job.config)
    if said.get("polyspec_control", getattr(job.config, "polyspec_control", None)) is None:
        job.costs = ready.costs
    job.model, job.chosen = ready.target, ready.line
    with refusals():
        mine = here(job.model, ready.assistants, ranks) if ranks.in_step else ready.assistants
        return checked_members(job.model, mine)
