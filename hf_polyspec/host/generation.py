# SPDX-License-Identifier: Apache-2.0
"""What generate() hands to a decoding loop and expects back: criteria, streamers, outputs, candidate generators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, TypeAlias

from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.utils import logging, output_capturing

from .release import GENERATION_CACHE, parameters_of

Output: TypeAlias = GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput

__all__ = [
    "CHOOSES_HIDDEN_STATES",
    "BaseStreamer",
    "CandidateGenerator",
    "EosTokenCriteria",
    "GenerateDecoderOnlyOutput",
    "GenerateEncoderDecoderOutput",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "Output",
    "StopStringCriteria",
    "decoder_output",
    "host_defaults",
    "is_callers",
    "keep_options",
    "made_output",
    "mask_length",
    "pad_id",
    "plain_loop",
    "quiet",
    "without",
]

CHOOSES_HIDDEN_STATES = hasattr(output_capturing, "resolve_hidden_states_indices")
"""Whether models of this release return single hidden states by their place in the tuple."""


def decoder_output(cache: Any, **others: Any) -> GenerateDecoderOnlyOutput:
    """generate()'s output object, the cache under the name that this release has for it."""
    return GenerateDecoderOnlyOutput(**others, **{GENERATION_CACHE: cache})


def made_output(cache: Any, encoded: Any, **others: Any) -> Output:
    """The same, of a model with an encoder where its outputs are given.

    Args:
        cache: as for `decoder_output`; encoded: the encoder's outputs, or None.
        others: as for `decoder_output`, and `cross_attentions`.
    """
    if encoded is None:
        return decoder_output(cache, **{name: value for name, value in others.items() if name != "cross_attentions"})
    own = {name: f"decoder_{name}" for name in ("hidden_states", "attentions")}
    named = {own.get(name, name): value for name, value in others.items()}
    read = {f"encoder_{name}": encoded.get(name) for name in own if others[name] is not None}
    return GenerateEncoderDecoderOutput(**named, **read, **{GENERATION_CACHE: cache})


def host_defaults(config: Any) -> dict[str, Any]:
    """Values that transformers fills into a generation config where nobody set any."""
    getter = getattr(config, "_get_default_generation_params", None)
    return dict(getter()) if callable(getter) else {}


class _Kept:
    """An option of this package on a generation config, where it lies among the config's own attributes.

    A config that transformers derived from a model's config is marked so, and when it is read back from a file that
    says so, everything that is not transformers' own is dropped. One in which somebody has set an option is not derived
    any more: setting it takes the mark away, as transformers' trainer does with configs that it changes.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, kind: type[Any]) -> Any:
        values = {} if config is None else vars(config)
        if self.name not in values:
            raise AttributeError(f"{kind.__name__!r} object has no attribute {self.name!r}")
        return values[self.name]

    def __set__(self, config: Any, value: Any) -> None:
        vars(config)[self.name] = value
        if value is not None and getattr(config, "_from_model_config", None):
            config._from_model_config = False

    def __delete__(self, config: Any) -> None:
        if vars(config).pop(self.name, self) is self:
            raise AttributeError(self.name)


def keep_options(names: Iterable[str]) -> None:
    """Let options of these names survive `save_pretrained` and `from_pretrained` on any generation config."""
    for name in names:
        if not hasattr(GenerationConfig, name):
            setattr(GenerationConfig, name, _Kept(name))


def without(config: Any, names: Iterable[str]) -> Any:
    """A copy of a generation config (of nothing, if None) that cannot be given these attributes: the model's own would
    otherwise be merged back in."""
    found = _lacking(frozenset(names))()
    if config is not None:
        kept = {name: value for name, value in vars(config).items() if name not in names}
        found.__dict__.update(copy.deepcopy(kept))
    return found


@lru_cache(maxsize=32)
def _lacking(names: frozenset[str]) -> type[GenerationConfig]:
    """A class of generation configs whose attributes of these names are always None."""
    nothing = property(lambda config: None, lambda config, value: None)
    return type("GenerationConfig", (GenerationConfig,), dict.fromkeys(names, nothing))


def pad_id(config: Any) -> int:
    """The id that rows of a prepared generation config go on with when they have ended; 0 where it names none."""
    pad = getattr(config, "_pad_token_tensor", None)
    return 0 if pad is None else int(pad)


def plain_loop(model: Any) -> Callable[..., Any] | None:
    """The loop that generate() runs with what it hands to `custom_generate`; None where a release has no such method.

    A class may have one of its own, as transformers looks it up.
    """
    loop = getattr(type(model), "_sample", None)
    wanted = {"input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"}
    return partial(loop, model) if loop is not None and wanted <= set(parameters_of(loop)) else None


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
