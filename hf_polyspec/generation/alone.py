# SPDX-License-Identifier: Apache-2.0
"""A target with which drafts cannot be checked: the loop that generate() would have run without assistants."""

from __future__ import annotations

import functools
import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from ..errors import TARGET, UncheckableError, refusals
from ..host.generation import Output, plain_loop
from ..host.ranks import ranks_of
from ..levels.names import name_of
from ..telemetry.counters import LevelStats
from ..telemetry.stats import PolySpecStats
from .course import Stopping

ALONE = "This call runs without assistants."
_OURS = ("inputs_tensor", "inputs_shown")
"""Among the arguments of `decode`'s, what plain generation's loop does not know."""


Parameters = ParamSpec("Parameters")
Made = TypeVar("Made")


def or_alone(decode: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """`decode`, or the text of a target that it cannot serve; with the same signature, by which generate() calls it."""
    named = inspect.signature(decode)

    @functools.wraps(decode)
    def decoding(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        try:
            return decode(*args, **kwargs)
        except UncheckableError as reason:
            bound = named.bind(*args, **kwargs)
            bound.apply_defaults()
            return cast("Made", alone(reason, bound.arguments))

    return decoding


def alone(reason: UncheckableError, given: dict[str, Any]) -> torch.Tensor | Output:
    """The text of a target that is served without gain, a token a pass, as plain generation makes it.

    Args:
        reason: why drafts cannot be checked; given: the arguments of `decode`, by name.

    Returns:
        What plain generation returns, with statistics where it is an output object.

    Raises:
        ValueError: the reason, where it is no target's, or something was asked for that plain generation does not
            know: `polyspec_seed`, or processes that share the target.

    Warns:
        UserWarning: says the reason.
    """
    model, ids, config = given["model"], given["input_ids"], given["generation_config"]
    loop = plain_loop(model)
    seeded = given["polyspec_seed"] is not None or getattr(config, "polyspec_seed", None) is not None
    if reason.level != TARGET or loop is None or seeded or ranks_of(model).in_step or given["synced_gpus"]:
        with refusals():
            raise reason
    warnings.warn(f"{reason} {ALONE}", stacklevel=5)
    more = {name: value for name, value in given["model_kwargs"].items() if name not in _OURS}
    criteria, started = given["stopping_criteria"], time.perf_counter()
    made: torch.Tensor | Output = loop(
        input_ids=ids,
        logits_processor=given["logits_processor"],
        stopping_criteria=criteria,
        generation_config=config,
        synced_gpus=False,
        streamer=given["streamer"],
        **more,
    )
    if not isinstance(made, torch.Tensor):
        new = made.sequences[:, ids.shape[1] :].tolist()
        ends = Stopping.sort(criteria, 0).eos
        made.polyspec = _stats(model, new, ends, time.perf_counter() - started, bool(config.do_sample), str(reason))
    return made


def _stats(
    model: Any, new: list[list[int]], ends: frozenset[int], seconds: float, sampled: bool, note: str
) -> PolySpecStats:
    lengths = [next((place + 1 for place, token in enumerate(row) if token in ends), len(row)) for row in new]
    level = LevelStats(name_of(model) or type(model).__name__, 0, forward_passes=len(new[0]), seconds=seconds)
    level.notes.append(f"{note} {ALONE}")
    return PolySpecStats(
        [level],
        [[0] * length for length in lengths],
        sum(lengths),
        seconds,
        bias=[0.0] * len(new),
        seed_holds=True if sampled else None,
    )
