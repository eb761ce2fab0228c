# SPDX-License-Identifier: Apache-2.0
"""Kinds of logits processors, by exact type: those that look at scores alone, and those that keep no state."""

from __future__ import annotations

import sys

from transformers import LogitsProcessor

from .forks import AllowedTokens
from .processors import DraftVocabularyProcessor


def _types(*names: str) -> frozenset[type]:
    """Those of the named classes that the installed transformers has beside the base class of all processors."""
    beside = sys.modules[LogitsProcessor.__module__]
    return frozenset(getattr(beside, name) for name in names if hasattr(beside, name))


POINTWISE = _types(
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "SuppressTokensLogitsProcessor",
) | {DraftVocabularyProcessor}
SCORES_ALONE = POINTWISE - _types("SuppressTokensLogitsProcessor") - {DraftVocabularyProcessor}
"""Pointwise ones that do not ask which id a score is of: they may be run on some of the ids."""
PREFIX = _types(
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
)
FUNCTIONS = _types("PrefixConstrainedLogitsProcessor")
"""Ones that ask a function of the caller's of the row and its ids, by its contract of nothing else."""
STATELESS = POINTWISE | PREFIX | {AllowedTokens}
