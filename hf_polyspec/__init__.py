# SPDX-License-Identifier: Apache-2.0
"""Exact multi-model speculative decoding for transformers.

import hf_polyspec
hf_polyspec.enable()
model.generate(**inputs, assistant_models=[middle, drafter])
"""

from typing import Any

from .engine.batch import BatchAnswer, generate_batch
from .engine.desk import EngineClosedError, QueueFullError
from .engine.doors import disable, enable
from .engine.engine import Engine
from .engine.request import Handle
from .errors import LevelError, RollbackError
from .exactness.context import Context
from .exactness.processors import DraftVocabularyProcessor, rank_tokens
from .exactness.proposal import Proposal
from .generation.candidates import PolySpecCandidateGenerator
from .generation.decoding import decode
from .generation.doors import PolySpecGenerationMixin, attach, detach, generate
from .generation.options import PolySpecOptions
from .levels.base import Drafter
from .levels.suffix import SuffixDrafter
from .telemetry.counters import LevelStats
from .telemetry.stats import PolySpecStats
from .version import __version__ as __version__

__all__ = [
    "BatchAnswer",
    "Context",
    "DraftVocabularyProcessor",
    "Drafter",
    "Engine",
    "EngineClosedError",
    "Handle",
    "LevelError",
    "LevelStats",
    "PolySpecCandidateGenerator",
    "PolySpecGenerationMixin",
    "PolySpecOptions",
    "PolySpecStats",
    "Proposal",
    "QueueFullError",
    "RollbackError",
    "SuffixDrafter",
    "attach",
    "decode",
    "detach",
    "disable",
    "early_exit",
    "enable",
    "generate",
    "generate_batch",
    "pack",
    "quantize_model",
    "rank_tokens",
    "recover",
    "unpack",
]

_QUANTIZATION = ("pack", "quantize_model", "recover", "unpack")


def __getattr__(name: str) -> Any:
    """The quantisation room is imported when it is first asked for: most programs never do."""
    if name == "early_exit":
        from .levels.early_exit import early_exit

        return early_exit
    if name in _QUANTIZATION:
        from . import quantization

        return getattr(quantization, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
