# SPDX-License-Identifier: Apache-2.0
"""From `assistant_models=[...]` to levels."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import nn

from ..defaults import DEFAULT_DRAFT_TOKENS
from ..eagle.features import bind, feature_layers, target_parts, view_of
from ..eagle.modeling import EagleHead
from ..errors import refusals
from ..host.compatibility import check_model, check_vocabularies, vocabulary_size
from ..host.encoded import is_encoder_decoder
from ..host.generation import CandidateGenerator
from ..host.in_step import serve
from ..host.lending import FEW, is_copy
from ..host.release import inner_model
from ..host.runner import ModelRunner
from ..host.vocabularies import Vocabularies
from ..host.walking import once_of, parameters_of_all
from ..levels.base import Drafter
from ..levels.candidate_generator import CandidateGeneratorDrafter
from ..levels.carried import carried_sizes
from ..levels.causal_lm import CausalLMDrafter
from ..levels.draft_memory import DraftMemory
from ..levels.eagle import EagleDrafter
from ..levels.joined import JoinedDrafter
from ..levels.names import name_of
from ..levels.shown import CompanionDrafter, ShownDrafter
from ..levels.verifier import NoDraft, Verifier
from ..models.companions import with_companions
from .abilities import show_features, slowness, trees_under
from .options import PolySpecOptions
from .setting import Setting, level_runner

_IS_META = attrgetter("is_meta")


def check_assistants(target: Any, assistants: Any, vocabularies: Sequence[Vocabularies | None] = ()) -> list[Any]:
    """Refuse what cannot be a chain, before anything is computed.

    Args:
        target, assistants: as the caller gave them; vocabularies: see `Setting`.

    Returns:
        The assistants as a list, those that only draft beside another model as drafters; none for the target alone.

    Raises:
        TypeError: not a list, or a member that is no model and no drafter.
        ValueError: a member that does not fit; the sentence says which and why.
    """
    with refusals():
        return checked_assistants(target, assistants, vocabularies)


def checked_assistants(target: Any, assistants: Any, vocabularies: Sequence[Vocabularies | None] = ()) -> list[Any]:
    """`check_assistants`, for who can do something else with a target that cannot check drafts.

    Raises:
        UncheckableError: it cannot; TypeError, ValueError: as `check_assistants`.
    """
    if not isinstance(assistants, (list, tuple)):
        raise TypeError(
            "assistant_models must be a list of models, drafters and names, the slowest first, "
            f"got {type(assistants).__name__}."
        )
    check_model(target, "the target", encodes=is_encoder_decoder(target))
    _check_weights(target, "the target")
    return checked_members(target, assistants, vocabularies)


def checked_members(
    target: Any, assistants: Sequence[Any], vocabularies: Sequence[Vocabularies | None] = ()
) -> list[Any]:
    """`checked_assistants` for a target that has been checked.

    Raises:
        TypeError, ValueError: as `check_assistants`.
    """
    encodes = is_encoder_decoder(target)
    assistants = with_companions(target, assistants)
    for i, assistant in enumerate(assistants):
        role = f"assistant_models[{i}]"
        _check_member(assistant, role)
        if isinstance(assistant, (Drafter, CandidateGenerator)):
            if i + 1 < len(assistants):
                raise ValueError(
                    f"{role} ({type(assistant).__name__}) only drafts and cannot check what "
                    f"assistant_models[{i + 1}] proposes; a drafter must come last."
                )
        elif isinstance(assistant, EagleHead):
            if not _is_branch(assistants[i + 1 :]):
                raise ValueError(
                    f"{role} ({_display_name(assistant)}) is an EAGLE head, which only drafts and cannot check what "
                    f"assistant_models[{i + 1}] proposes; a head must come last, or before one drafter without a "
                    "model (SuffixDrafter), whose drafts join its trees."
                )
            _bound(assistant, ([target, *assistants])[i], role)
        else:
            check_model(assistant, role, encodes=encodes)
            if not (vocabularies and vocabularies[i]):
                check_vocabularies(target, assistant, role)
    return list(assistants)


def _check_member(assistant: Any, role: str) -> None:
    """Refuse what is no level at all.

    Raises:
        TypeError: a class, or neither model nor drafter; ValueError: a model without weights.
    """
    if isinstance(assistant, type):
        raise TypeError(f"{role} is the class {assistant.__name__}; pass an object of it.")
    if isinstance(assistant, (Drafter, CandidateGenerator)):
        return
    if not isinstance(assistant, nn.Module) or not hasattr(assistant, "config"):
        raise TypeError(
            f"{role} must be a causal language model, an EAGLE head, a Drafter, a CandidateGenerator or a name, got "
            f"{'None' if assistant is None else type(assistant).__name__}."
        )
    _check_weights(assistant, role)


def _check_weights(model: nn.Module, role: str) -> None:
    """Refuse a model whose weights have not been loaded; those that accelerate keeps elsewhere are loaded.

    Raises:
        ValueError: names the first weight.
    """
    if not once_of(model, "on meta", _lacks_weights):
        return
    empty = next((name for name, weight in model.named_parameters() if weight.device.type == "meta"), None)
    if empty is not None and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            f"{role} ({_display_name(model)}) has no weights yet: {empty} is on the meta device; load them, as "
            "from_pretrained does."
        )


def _lacks_weights(model: nn.Module) -> bool:
    return any(map(_IS_META, parameters_of_all(model)))


def build_chain(target: Any, assistants: Sequence[Any], setting: Setting, runner: ModelRunner) -> Verifier:
    """The chain as one verifier; `begin` has been called on every level.

    Args:
        target: the model generate() was called on; assistants: checked by `check_assistants`.
        setting: what all levels share.
        runner: the target's.

    Raises:
        ValueError: a drafter cannot serve this many rows.
    """
    serve(runner, 1 if setting.joins else setting.batch, padded=setting.padded)
    below = build_below(assistants, setting, target)
    # Hidden states and attentions are asked for by column, and a tree's columns are no text.
    watched = "the caller asked for hidden states or attentions" if runner.record else None
    trees, note = trees_under(runner, below, watched)
    show_features(runner, below)
    chain = Verifier(
        runner,
        below,
        name=_display_name(target),
        bias_budget=float(setting.options.polyspec_bias_budget),
        rule=setting.options.polyspec_verification,
        eos=setting.eos,
        pad=setting.pad,
        draft_limit=_draft_limit(assistants, 0, setting, runner),
        trees=trees,
        note=note or slowness(runner),
    )
    chain.begin(0, 0 if setting.joins else setting.batch, vocabulary_size(target))
    _lend(chain)
    return chain


def _lend(chain: Verifier) -> None:
    """Let levels that are copies of the target take its keys and values."""
    target = chain.runner
    # Not where somebody wants to see how the prompt is read, or rows must not be moved.
    if not target.use_cache or target.record or target.in_step or not target.cache.lends:
        return
    for level in levels_of(chain)[1:]:
        if (
            isinstance(level, (Verifier, CausalLMDrafter))
            and level.runner.cuts
            and level.runner.own_rows is target.own_rows
            and is_copy(level.runner.model, target.model)
        ):
            level.runner.lender = target
            chain.borrowers.append(level.runner)
            if isinstance(level, Verifier) and level.direct_tokens:
                level.runner.borrows_from = FEW
            if isinstance(level, Verifier):
                chain.watchers.append(level.below)


def build_below(assistants: Sequence[Any], setting: Setting, target: Any = None) -> Drafter:
    """The levels below the target, as one level that has yet to begin; one that never drafts where there are none.

    Args:
        assistants: checked by `check_assistants`.
        setting: what all levels share.
        target: the model above them, where it shows its passes to a level below; else None.

    Raises:
        ValueError: a drafter cannot serve this many rows, or needs to see the passes of a target that shows none.
    """
    below: Drafter | None = None
    for i in reversed(range(len(assistants))):
        below = _level(assistants, i, below, setting, target)
        if setting.joins and not below.takes_rows:
            raise ValueError(
                f"assistant_models[{i}] ({below.name}) follows rows that leave (keep_rows) and has no add_rows, which "
                "an engine calls for rows that join; add it, or use generate()."
            )
        if below.max_batch is not None and setting.batch > below.max_batch:
            raise ValueError(
                f"assistant_models[{i}] ({below.name}) serves at most {below.max_batch} row(s) at a time, "
                f"and this batch has {setting.batch}."
            )
    return NoDraft() if below is None else below


def levels_of(chain: Verifier) -> list[Drafter]:
    """All levels, the target first; nothing stands for what never drafts."""
    found: list[Drafter] = [chain]
    while isinstance(found[-1], Verifier):
        found.append(found[-1].below)
    if isinstance(found[-1], NoDraft):
        found.pop()
    if isinstance(found[-1], JoinedDrafter):
        found[-1:] = found[-1].parts
    return found


def _is_branch(following: Sequence[Any]) -> bool:
    """Whether what follows a head may: nothing, or one drafter that only continues."""
    return len(following) <= 1 and all(isinstance(one, (Drafter, CandidateGenerator)) for one in following)


def _draft_limit(assistants: Sequence[Any], place: int, setting: Setting, runner: ModelRunner) -> int | None:
    """The caller's num_assistant_tokens for a drafter without a model, which has no configuration of its own.

    A model that reads one token a pass gains nothing from a draft and is offered none.
    """
    if runner.steps:
        return 0
    without_model = place < len(assistants) and isinstance(assistants[place], (Drafter, CandidateGenerator))
    return setting.options.num_assistant_tokens if without_model else None


def _direct_tokens(below: Drafter, setting: Setting, options: PolySpecOptions) -> int:
    """From how many tokens on a draft of this level passes the middle above it by; 0 for never."""
    sure = below.long_is_sure(setting.device) and options.polyspec_control == "fixed"
    return options.polyspec_direct_tokens if sure else 0


def _level(
    assistants: Sequence[Any], place: int, below: Drafter | None, setting: Setting, target: Any = None
) -> Drafter:
    assistant = assistants[place]
    if isinstance(assistant, ShownDrafter) and not place and target is None:
        raise ValueError(
            f"assistant_models[0] ({assistant.name}) reads the hidden states of the level above it; here it needs a "
            "model between the target and itself."
        )
    if isinstance(assistant, CompanionDrafter):
        return _settled(assistant, setting)
    if isinstance(assistant, Drafter):
        return assistant
    if isinstance(assistant, CandidateGenerator):
        return CandidateGeneratorDrafter(assistant)
    if isinstance(assistant, EagleHead):
        head = _head_level(assistants, place, setting, target)
        if below is None:
            return head
        return JoinedDrafter(
            head,
            below,
            eos=setting.eos,
            branch_limit=setting.options.num_assistant_tokens,
            chain_tokens=head.draft_tokens,
            direct_tokens=setting.options.polyspec_direct_tokens,
        )
    name = _display_name(assistant)
    runner = level_runner(assistant, place, setting, target)
    options = setting.options.for_assistant(assistant)
    if below is not None:
        trees, note = trees_under(runner, below)
        show_features(runner, below)
        return Verifier(
            runner,
            below,
            name=name,
            block_size=options.polyspec_block_size,
            rule=options.polyspec_verification,
            eos=setting.eos,
            pad=setting.pad,
            draft_limit=_draft_limit(assistants, place + 1, setting, runner),
            direct_tokens=_direct_tokens(below, setting, options),
            trees=trees,
            note=note or slowness(runner),
        )
    length = options.num_assistant_tokens or DEFAULT_DRAFT_TOKENS
    return CausalLMDrafter(
        runner,
        name=name,
        draft_tokens=length,
        confidence_threshold=options.assistant_confidence_threshold or 0.0,
        schedule=options.num_assistant_tokens_schedule or "constant",
        eos=setting.eos,
        draft_temperature=options.polyspec_draft_temperature or 1.0,
        carried=carried_sizes(inner_model(assistant), length),
    )


def _settled(drafter: CompanionDrafter, setting: Setting) -> CompanionDrafter:
    options = setting.options.for_assistant(drafter.assistant)
    length = options.num_assistant_tokens or drafter.longest
    drafter.settle(
        draft_tokens=length,
        confidence_threshold=options.assistant_confidence_threshold or 0.0,
        schedule=options.num_assistant_tokens_schedule or "constant",
        eos=setting.eos,
        draft_temperature=options.polyspec_draft_temperature or 1.0,
        carried=carried_sizes(inner_model(drafter.assistant), length),
    )
    return drafter


def _head_level(assistants: Sequence[Any], place: int, setting: Setting, target: Any) -> EagleDrafter:
    head, above = assistants[place], assistants[place - 1] if place else target
    if above is None:
        raise ValueError(
            f"assistant_models[{place}] ({_display_name(head)}) is an EAGLE head, which reads the hidden states of the "
            "level above it; here it needs a model between the target and itself."
        )
    options = setting.options.for_assistant(head)
    parts = target_parts(inner_model(above))
    length = options.num_assistant_tokens or DEFAULT_DRAFT_TOKENS
    return EagleDrafter(
        _bound(head, above, f"assistant_models[{place}]"),
        feature_layers(head.config, parts.num_layers),
        name=_display_name(head),
        device=setting.device,
        draft_tokens=length,
        confidence_threshold=options.assistant_confidence_threshold or 0.0,
        schedule=options.num_assistant_tokens_schedule or "constant",
        eos=setting.eos,
        tree_tokens=options.polyspec_tree_tokens,
        tree_depth=options.polyspec_tree_depth,
        tree_top_k=options.polyspec_tree_top_k,
        draft_vocabulary=options.polyspec_draft_vocabulary,
        draft_temperature=options.polyspec_draft_temperature or head.config.draft_temperature,
        memory=DraftMemory() if options.polyspec_draft_copies else None,
        carried=carried_sizes(head, length, options.polyspec_tree_tokens, options.polyspec_tree_depth),
    )


def _bound(head: EagleHead, above: Any, role: str) -> EagleHead:
    """A view of a head (the same weights) that borrows embedding and lm_head from the level above; the caller's head
    stays bound to whatever it was bound to.

    Raises:
        ValueError: in one sentence, why it does not fit.
    """
    try:
        return bind(view_of(head), inner_model(above))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{role} ({_display_name(head)}) does not fit the level above it: {error}") from error


def _display_name(model: Any) -> str:
    return name_of(model) or type(inner_model(model)).__name__
