# SPDX-License-Identifier: Apache-2.0
"""`tokenizer=` and `assistant_tokenizer=`: which members of a chain have a vocabulary of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..eagle.modeling import EagleHead
from ..host.compatibility import check_vocabularies, vocabulary_size
from ..host.generation import CandidateGenerator
from ..host.vocabularies import Vocabularies
from ..levels.base import Drafter
from ..levels.shown import ShownDrafter


def vocabularies(
    target: Any, assistants: Sequence[Any], tokenizer: Any, assistant_tokenizer: Any
) -> list[Vocabularies | None]:
    """For every member the two vocabularies it stands between; None for those that share the target's, and nothing at
    all where all do.

    Args:
        target: the model generate() was called on; assistants: the members of its chain.
        tokenizer: the target's; assistant_tokenizer: of the one member that has another, or a list with one for each
            member, None for those with the target's.

    Raises:
        TypeError: something given is no tokenizer.
        ValueError: the target's is missing, the list has another length than assistant_models, it does not say which
            member is meant, or a member's vocabulary has no word of the target's.
    """
    if assistant_tokenizer is None or not isinstance(assistants, (list, tuple)):
        return []
    if tokenizer is None:
        raise ValueError("assistant_tokenizer needs the target's tokenizer too: pass tokenizer=... to generate().")
    if isinstance(assistant_tokenizer, (list, tuple)):
        if len(assistant_tokenizer) != len(assistants):
            raise ValueError(
                f"assistant_tokenizer has {len(assistant_tokenizer)} entries and assistant_models {len(assistants)}; "
                "give one for each, None for those with the target's tokenizer."
            )
        given = list(assistant_tokenizer)
    else:
        place = _meant(target, assistants)
        given = [assistant_tokenizer if i == place else None for i in range(len(assistants))]
    found = [
        None if one is None else _pair(target, assistant, tokenizer, one, f"assistant_models[{i}]")
        for i, (assistant, one) in enumerate(zip(assistants, given, strict=True))
    ]
    for i, assistant in enumerate(assistants[1:], start=1):
        if isinstance(assistant, (EagleHead, ShownDrafter)) and found[i - 1] is not None:
            kind = (
                "an EAGLE head" if isinstance(assistant, EagleHead) else f"{assistant.name}, which reads hidden states,"
            )
            raise ValueError(
                f"assistant_models[{i}] is {kind} under a model with another tokenizer, whose hidden states are "
                "of other tokens; put a model or a drafter there, or the head under the target."
            )
    return found


def _meant(target: Any, assistants: Sequence[Any]) -> int:
    """The member that a single tokenizer is of: the only model, or the only one whose vocabulary is another.

    Raises:
        ValueError: that is none, or several.
    """
    models = [i for i, one in enumerate(assistants) if not isinstance(one, (Drafter, CandidateGenerator, EagleHead))]
    other = [i for i in models if _differs(target, assistants[i])] if len(models) > 1 else models
    if len(other) != 1:
        raise ValueError(
            f"assistant_tokenizer is one tokenizer, and {len(other)} of the {len(models)} models in assistant_models "
            "may be the one with another vocabulary; give a list with one tokenizer for each member, None for those "
            "with the target's."
        )
    return other[0]


def _differs(target: Any, assistant: Any) -> bool:
    try:
        check_vocabularies(target, assistant, "")
    except ValueError:
        return True
    return False


def _pair(target: Any, assistant: Any, tokenizer: Any, own: Any, role: str) -> Vocabularies | None:
    if isinstance(assistant, (Drafter, CandidateGenerator, EagleHead)):
        raise ValueError(f"{role} ({type(assistant).__name__}) has no tokenizer of its own; give None for it.")
    pair = Vocabularies(tokenizer, vocabulary_size(target), own, vocabulary_size(assistant))
    if pair.same:
        check_vocabularies(target, assistant, role)
        return None
    if not len(pair.mine):
        raise ValueError(f"{role} cannot draft for the target: their tokenizers have no word in common.")
    return pair
