# SPDX-License-Identifier: Apache-2.0
"""A request as generate() would prepare it: ids, processors, criteria and options, all checked before it waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ..exactness.callers_generator import drawn_seed
from ..generation.course import Stopping
from ..generation.decoding import UNDERSTOOD, UNLIMITED
from ..generation.options import PolySpecOptions
from ..generation.outputs import Wanted
from ..host.compatibility import check_options
from ..host.generation import StopStringCriteria, without
from ..host.release import cache_names, input_device

_ALONE = {
    "past_key_values": "an engine's rows have caches of its own",
    "inputs_embeds": "an engine reads token ids",
    "use_cache": "an engine's rows have caches of its own",
    "synced_gpus": "an engine runs in one process",
    "assistant_models": "the levels are the engine's: Engine(model, assistant_models=[...])",
    "assistant_model": "the levels are the engine's: Engine(model, assistant_models=[...])",
    "custom_generate": "the engine is the decoding loop",
    "position_ids": "positions are counted from the first token on",
}
"""Arguments of generate() that a request does not take, and why."""


@dataclass(frozen=True)
class Prepared:
    """One request, ready to run.

    Attributes:
        ids: of the prompt, without padding.
        processors, config: as generate() prepared them.
        stopping: when the text ends.
        wanted: which extras the caller asked for.
        seed: what a sampled text is drawn with, None for a greedy one.
        options: the engine's, with this request's seed.
    """

    ids: list[int]
    processors: LogitsProcessorList
    stopping: Stopping
    config: GenerationConfig
    wanted: Wanted
    seed: int | None
    options: PolySpecOptions

    @property
    def tokens(self) -> int:
        """Most tokens that the request's row can come to hold."""
        return max(self.stopping.max_length, len(self.ids) + 1)


def prepare(
    model: Any,
    prompt: Any,
    generation_config: GenerationConfig | None,
    seed: int | None,
    options: PolySpecOptions,
    tokenizer: Any,
    kwargs: dict[str, Any],
) -> Prepared:
    """Have generate() prepare a request, up to where its loop would begin.

    Args:
        model: the target; prompt: see `prompt_ids`.
        generation_config, kwargs: as generate() takes them, of what a request may bring.
        seed: of this request; options: the engine's.
        tokenizer: for a prompt that is text, and for stop strings; None for none.

    Raises:
        ValueError, TypeError: in one sentence, what cannot be served.
    """
    ids = prompt_ids(prompt, tokenizer)
    _check_arguments(kwargs)
    generation_config, kwargs = _with_stop_strings(model, generation_config, tokenizer, kwargs)
    found: list[tuple[Any, ...]] = []

    def capture(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        found.append((input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs))
        return input_ids

    whole = torch.tensor([ids], dtype=torch.long, device=input_device(model))
    model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        generation_config=generation_config,
        custom_generate=capture,
        **kwargs,
    )
    input_ids, processors, criteria, config, model_kwargs = found[0]
    _check_prepared(input_ids, config, model_kwargs)
    if seed is None:
        seed = PolySpecOptions.read({}, config).polyspec_seed  # type: ignore[assignment]
    if config.do_sample:
        seed = drawn_seed(whole.device) if seed is None else seed
        options = replace(options, polyspec_seed=seed)
    stopping = Stopping.sort(criteria, config.max_length or UNLIMITED)
    return Prepared(ids, processors, stopping, config, Wanted.of(config), seed if config.do_sample else None, options)


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """The ids of one prompt.

    Args:
        prompt: text, if there is a tokenizer; or ids: a list, a tensor `[L]` or `[1, L]`, or what a tokenizer returns
            (a mapping with `input_ids` and perhaps `attention_mask`, whose zeros are padding).
        tokenizer: turns text into ids.

    Raises:
        ValueError, TypeError: none of these, or empty.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                "a prompt that is text needs a tokenizer: Engine(model, tokenizer=...), or submit token ids."
            )
        prompt = tokenizer(prompt)
    mask: Any = None
    if isinstance(prompt, Mapping):
        others = sorted(set(prompt) - {"input_ids", "attention_mask", "token_type_ids"})
        if others or "input_ids" not in prompt:
            raise ValueError(f"a prompt's mapping holds input_ids and attention_mask, got {sorted(prompt)}.")
        prompt, mask = prompt["input_ids"], prompt.get("attention_mask")
    ids = _row(prompt)
    if mask is not None:
        real = _row(mask)
        if len(real) != len(ids):
            raise ValueError(f"attention_mask has {len(real)} columns and the prompt {len(ids)}; give one for each.")
        ids = [token for token, one in zip(ids, real, strict=True) if one]
    if not ids:
        raise ValueError("the prompt is empty; give at least one token to start from.")
    return ids


def _row(values: Any) -> list[int]:
    """One row of whole numbers, from a list or tensor of them or of one such row."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, Sequence) and len(listed) == 1 and isinstance(listed[0], (list, tuple)):
        listed = listed[0]
    if not isinstance(listed, (list, tuple)):
        raise TypeError(
            f"a prompt is text, or token ids (a list, or a tensor of one row), got {type(values).__name__}."
        )
    for token in listed:
        if isinstance(token, bool) or not isinstance(token, int):
            what = "several rows; submit each prompt by itself" if isinstance(token, (list, tuple)) else repr(token)
            raise TypeError(f"a prompt's token ids are whole numbers of one row, got {what}.")
    return list(listed)


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    for name, why in _ALONE.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"submit() does not take {name}: {why}.")
    of_engine = [name for name in PolySpecOptions.names() if kwargs.get(name) is not None]
    if of_engine:
        raise ValueError(f"{of_engine[0]} holds for all requests: give it to Engine(...), not to submit().")


def _with_stop_strings(
    model: Any, config: GenerationConfig | None, tokenizer: Any, kwargs: dict[str, Any]
) -> tuple[GenerationConfig | None, dict[str, Any]]:
    """Turn stop strings into a criterion: transformers has no tokenizer where a callable takes its loop's place."""
    strings = kwargs.get("stop_strings")
    for named in (config, getattr(model, "generation_config", None)):
        strings = getattr(named, "stop_strings", None) if strings is None else strings
    if strings is None:
        return config, kwargs
    if tokenizer is None:
        raise ValueError("stop_strings need the tokenizer: Engine(model, tokenizer=...), or submit(tokenizer=...).")
    criteria = StoppingCriteriaList(kwargs.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
    rest = {name: value for name, value in kwargs.items() if name != "stop_strings"}
    return without(config, ["stop_strings"]), rest | {"stopping_criteria": criteria}


def _check_prepared(input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    check_options(config)
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"num_return_sequences={input_ids.shape[0]} in a request; submit the prompt as often, each with its seed."
        )
    for name in ("output_hidden_states", "output_attentions"):
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ValueError(f"{name} is not served where rows share passes; use generate(), or leave it out.")
    if getattr(config, "prefill_chunk_size", None):
        raise ValueError("prefill_chunk_size is not served where rows join; leave it out.")
    unknown = sorted(set(model_kwargs) - UNDERSTOOD - set(cache_names(dict(model_kwargs))))
    unknown = [name for name in unknown if model_kwargs[name] is not None]
    if unknown:
        raise ValueError(
            f"the forward argument {unknown[0]!r} belongs to one prompt, and rows share passes; leave it out."
        )
