# SPDX-License-Identifier: Apache-2.0
"""What a verifier can do for the level below it: check its trees, gain from its drafts, show it hidden states."""

from __future__ import annotations

from ..host.generation import CHOOSES_HIDDEN_STATES
from ..host.release import inner_model
from ..host.runner import ModelRunner
from ..host.seq_to_seq import SeqToSeqRunner
from ..host.shared_keys import SharedKeys
from ..host.translated import TranslatedRunner
from ..host.trees import hindrance
from ..levels.base import Drafter
from ..levels.keyless import KeylessDrafter


def trees_under(runner: ModelRunner, below: Drafter, reason: str | None = None) -> tuple[bool, str | None]:
    """Whether a verifier is to check trees, and what to say if it cannot though they were asked for."""
    if not below.grows_trees:
        return False, None
    if reason is None and isinstance(runner, TranslatedRunner):
        reason = "it has another tokenizer than the target"
    if reason is None and isinstance(runner, SeqToSeqRunner):
        reason = "it attends to an encoder"
    if reason is None and not runner.cuts:
        reason = "its recurrent state follows one text at a time"
    if reason is None and not (runner.use_cache and runner.takes_positions):
        reason = "it keeps no cache" if runner.takes_positions else "it takes no position_ids"
    if reason is None and (runner.in_step or not runner.keeps_positions):
        reason = "it counts positions by the columns of its cache"
    reason = reason or hindrance(inner_model(runner.model))
    return reason is None, None if reason is None else f"chains instead of trees under {runner.name}: {reason}"


def slowness(runner: ModelRunner) -> str | None:
    """What to say of a model that no draft can speed up."""
    if not runner.steps:
        return None
    return f"{runner.name} goes on exactly only one token a pass (its recurrent state), so it is offered no drafts"


def show_features(runner: ModelRunner, below: Drafter) -> None:
    """Have a verifier's passes return the hidden states that the level below reads, and no others; and its keys.

    A caller who asked for all of them gets all. Older transformers releases number a list in another way, or take it
    for a yes, and are asked for all.
    """
    if isinstance(below, KeylessDrafter):
        below.keys = SharedKeys(runner, below.drafter.layers)
    if below.reads_layers:
        wanted = list(below.reads_layers) if CHOOSES_HIDDEN_STATES else True
        runner.record = {"output_hidden_states": wanted, **runner.record}
