# SPDX-License-Identifier: Apache-2.0
"""What all levels of one chain share, and the runner of each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..exactness.context import Prompt
from ..host.embeddings import reads_any, same_places
from ..host.encoded import Encoded, attends_to_encoder, encoded_for, is_encoder_decoder
from ..host.forwarding import Extras
from ..host.in_step import serve
from ..host.joining import joining_runner
from ..host.manners import runner_for
from ..host.release import inner_model
from ..host.runner import ModelRunner
from ..host.translated import TranslatedRunner
from ..host.vocabularies import Vocabularies
from ..levels.names import name_of
from .options import PolySpecOptions


@dataclass(frozen=True)
class Setting:
    """What all levels of one chain share.

    Attributes:
        options: the caller's.
        device: where laws are compared; the device of the caller's ids.
        eos: ids that end a text; pad: id that finished rows go on with.
        batch: number of rows.
        embedded: width H of the prompt's embeddings if it came as embeddings, else 0.
        extras: what else the target is given.
        encoded: what the target's decoder attends to, where it has an encoder.
        vocabularies: for every assistant the two it stands between, None where there is one; empty where all share one.
        joins: whether rows join while others run; there are none at first, and at most `batch`.
        prompt: what the caller gave as one, None where rows join.
        own_rows: whether rows may each have their own columns, by what the caller gave.
        longest: most columns that a row may come to have.
    """

    options: PolySpecOptions
    device: torch.device
    eos: frozenset[int]
    pad: int
    batch: int
    embedded: int = 0
    extras: Extras = field(default_factory=Extras)
    encoded: Encoded | None = None
    vocabularies: Sequence[Vocabularies | None] = ()
    joins: bool = False
    own_rows: bool = False
    longest: int = 0
    prompt: Prompt | None = None

    @property
    def nameless(self) -> bool:
        """Whether tokens of the prompt have no ids."""
        return self.prompt is not None and self.prompt.hidden > 0

    @property
    def padded(self) -> bool:
        """Whether a mask hides columns of the prompt."""
        mask = None if self.prompt is None else self.prompt.mask
        return mask is not None and not bool(mask.all())

    def vocabularies_of(self, place: int) -> Vocabularies | None:
        """What stands between the target and an assistant with another tokenizer."""
        return self.vocabularies[place] if self.vocabularies else None


def level_runner(assistant: Any, place: int, setting: Setting, target: Any) -> ModelRunner:
    """The runner of an assistant, in the target's ids."""
    vocabularies = setting.vocabularies_of(place)
    hidden = assistant.get_input_embeddings().weight.shape[-1]
    role = f"assistant_models[{place}] ({name_of(assistant) or type(inner_model(assistant)).__name__})"
    extras = None if target is None or vocabularies is not None else setting.extras.for_level(assistant, target)
    fits = bool(setting.embedded) and hidden == setting.embedded and vocabularies is None
    reads_embeds = fits and reads_any(assistant)
    if setting.embedded and extras is not None and extras.first:
        # It would look for pictures in the embeddings of another model, and find none.
        reads_embeds = reads_embeds and (setting.nameless or same_places(assistant, target))
        if setting.nameless and not (reads_embeds and same_places(assistant, target)):
            extras = replace(extras, first={})
    encoded = None
    if setting.encoded is not None and (is_encoder_decoder(assistant) or attends_to_encoder(assistant)):
        encoded = encoded_for(assistant, target, setting.encoded, role)
    make: Any = joining_runner if setting.joins else partial(runner_for, encoded=encoded)
    runner: ModelRunner = make(
        assistant,
        role,
        setting.device,
        reads_embeds=reads_embeds,
        replace_unknown_ids=True,
        extras=extras,
        rows=setting.batch if setting.own_rows and not setting.joins and vocabularies is None else 0,
        columns=setting.longest,
    )
    serve(runner, 1 if setting.joins else setting.batch)
    return runner if vocabularies is None else TranslatedRunner(runner, vocabularies)
