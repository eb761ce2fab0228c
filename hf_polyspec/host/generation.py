# SPDX-License-Identifier: Apache-2.0
"""What generate() hands to a decoding loop and expects back: criteria, streamers, outputs, candidate generators."""

from __future__ import annotations

from typing import Any

from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging, output_capturing

from .release import GENERATION_CACHE

__all__ = [
    "CHOOSES_HIDDEN_STATES",
    "BaseStreamer",
    "CandidateGenerator",
    "EosTokenCriteria",
    "GenerateDecoderOnlyOutput",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "StopStringCriteria",
    "decoder_output",
    "host_defaults",
    "is_callers",
    "mask_length",
    "pad_id",
    "quiet",
]

CHOOSES_HIDDEN_STATES = hasattr(output_capturing, "resolve_hidden_states_indices")
"""Whether models of this release return single hidden states by their place in the tuple."""


def decoder_output(cache: Any, **others: Any) -> GenerateDecoderOnlyOutput:
    """generate()'s output object, the cache under the name that this release has for it."""
    return GenerateDecoderOnlyOutput(**others, **{GENERATION_CACHE: cache})


def host_defaults(config: Any) -> dict[str, Any]:
    """Values that transformers fills into a generation config where nobody set any."""
    getter = getattr(config, "_get_default_generation_params", None)
    return dict(getter()) if callable(getter) else {}


def pad_id(config: Any) -> int:
    """The id that rows of a prepared generation config go on with when they have ended; 0 where it names none."""
    pad = getattr(config, "_pad_token_tensor", None)
    return 0 if pad is None else int(pad)


def mask_length(config: Any) -> int | None:
    """Columns of the attention mask that the caller gave and generate() left out because nothing was padded."""
    found: int | None = getattr(config, "_mask_length", None)
    return found


def is_callers(cache: Any) -> bool:
    """Whether a cache came from the caller, who may go on with it."""
    return bool(getattr(cache, "_is_user_defined", False))


def quiet(*, errors_only: bool = False) -> None:
    """No progress bars of transformers from now on in this process, and on request no warnings in its log either."""
    if errors_only:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
