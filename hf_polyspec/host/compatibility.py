# SPDX-License-Identifier: Apache-2.0
"""What a chain cannot serve, refused in one sentence before the first forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin

from ..errors import TARGET, UncheckableError
from .carried import carried_by
from .manners import Manner, feeds_otherwise, manner_of
from .peculiar import looks_back_only
from .release import cache_argument, inner_model, no_cache_argument
from .rereading import rereads
from .states import unknown_layer

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"}
"""Layer types whose cache is a list of keys and values that can be cut; all others keep a state that cannot."""

_OWN_CACHE_ENTRIES = {"cpmant"}
"""Model types whose cache holds more than the tokens they are given."""

MAX_VOCABULARY_PADDING = 1024
"""Largest difference in vocabulary rows that padding explains (Qwen2.5: 128)."""

_REFUSED_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("num_beams", 1, "beam search"),
    ("num_beam_groups", 1, "group beam search"),
    ("constraints", None, "constrained beam search"),
    ("force_words_ids", None, "constrained beam search"),
    ("penalty_alpha", None, "contrastive search"),
    ("dola_layers", None, "DoLa decoding"),
    ("prompt_lookup_num_tokens", None, "prompt lookup (put a SuffixDrafter into assistant_models instead)"),
    ("assistant_early_exit", None, "early exit (put the smaller model into assistant_models instead)"),
    ("use_mtp", None, 'multi-token-prediction layers (put "mtp" into assistant_models instead)'),
    ("speculation_type", None, "transformers' own speculation (put the drafter itself into assistant_models instead)"),
)


def other_strategy(*options: Mapping[str, Any]) -> tuple[str, str] | None:
    """A decoding strategy that a chain does not serve, among options of which the first that says something counts.

    Returns:
        The option and a sentence without its end; None if there is none.
    """
    for name, neutral, what in _REFUSED_OPTIONS:
        value = next((some[name] for some in options if some.get(name) is not None), None)
        if value is not None and value is not False and _asks(value, neutral):
            return name, f"{name}={value!r} asks for {what}, which assistant_models cannot serve"
    return None


def _asks(value: Any, neutral: Any) -> bool:
    try:
        return bool(value != neutral and value != 0)
    except (ValueError, RuntimeError):  # an array of several numbers is neither
        return True


def check_options(config: GenerationConfig) -> None:
    """Refuse decoding strategies that a chain does not serve.

    Raises:
        ValueError: names the option.

    Warns:
        UserWarning: an option of no consequence for the text is not honoured.
    """
    if asked := other_strategy(vars(config)):
        raise ValueError(f"{asked[1]}; leave it unset.")
    ensemble = getattr(config, "assistant_ensemble_weight", None)
    if ensemble is not None and ensemble != 1.0:
        raise ValueError(
            "assistant_ensemble_weight changes the target's distribution, which assistant_models promise not to do; "
            "leave it unset."
        )
    check_cache_implementation(config.cache_implementation)
    if getattr(config, "compile_config", None) is not None:
        warnings.warn(
            "compile_config is not used with assistant_models: the passes of a chain differ in width, and each width "
            "would be compiled anew; compile the models themselves (torch.compile), or leave it unset.",
            stacklevel=4,
        )


def check_cache_implementation(name: str | None) -> None:
    """Refuse caches that cannot be rolled back after a rejected draft.

    Raises:
        UncheckableError: of one that is rounded; ValueError: of any other. Both name the cache.
    """
    if name in (None, "dynamic", "dynamic_full", "static", "hybrid", "sliding_window", "offloaded", "offloaded_static"):
        return
    remedy = "cannot be rolled back after a rejected draft; leave it unset (or 'static', 'dynamic' or 'offloaded') to"
    if name == "quantized":
        raise UncheckableError(
            f"cache_implementation={name!r} is rounded as it grows and {remedy} use assistant_models.", TARGET
        )
    raise ValueError(f"cache_implementation={name!r} is not known here and {remedy} use assistant_models.")


def check_model(model: nn.Module, role: str, *, encodes: bool = False) -> None:
    """Refuse a model that cannot be a level.

    Args:
        model: the model; role: how to call it in the message ("the target", "assistant_models[0]").
        encodes: whether it may have an encoder.

    Raises:
        UncheckableError: drafts cannot be checked with it; ValueError: it can be no level at all. Both name the model
            and what about it does not fit.
    """
    config = model.config
    kind = type(inner_model(model)).__name__
    # A PEFT wrapper's generate() calls that of the model inside, leaving only its input preparation there.
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    peft_config = getattr(owner, "active_peft_config", None)
    if peft_config is not None and getattr(peft_config, "is_prompt_learning", False):
        raise UncheckableError(
            f"{role} has a prompt-learning adapter ({peft_config.peft_type}), whose virtual tokens cannot be rolled "
            "back; use LoRA or merge the adapter.",
            role,
        )
    if getattr(config, "is_encoder_decoder", False):
        if not encodes:
            raise ValueError(f"{role} ({kind}) has an encoder, and the target has none; leave it out.")
        if cache_argument(model) is None:
            raise UncheckableError(no_cache_argument(f"{role} ({kind})", model), role)
        return
    _check_state(model, role, kind)
    # BERT's family; others have both of these as well and mean nothing by them.
    two_sided = getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention")
    if two_sided and not looks_back_only(model):
        raise UncheckableError(
            f"{role} ({kind}) attends to both sides; load it with is_decoder=True in its config.", role
        )
    if getattr(config, "model_type", None) in _OWN_CACHE_ENTRIES:
        raise UncheckableError(
            f"{role} ({kind}) adds prompt positions of its own to its cache; chains cannot use it.", role
        )
    if cache_argument(model) is None and carried_by(model).argument is None and not rereads(model):
        raise UncheckableError(no_cache_argument(f"{role} ({kind})", model), role)
    if not hasattr(inner_model(model), "generate") or not _says_words(model):
        raise ValueError(f"{role} ({kind}) has no language-modelling head; load it with AutoModelForCausalLM.")


def _says_words(model: Any) -> bool:
    """Whether a model has a language-modelling head; one that is a whole around a language model may have it there."""
    inner = inner_model(model)
    parts = [part for part in inner.children() if isinstance(part, GenerationMixin)]
    return any(part.get_output_embeddings() is not None for part in (inner, *parts))


def _check_state(model: Any, role: str, kind: str) -> None:
    """Refuse a model that keeps what can neither be cut nor put back.

    Raises:
        UncheckableError: names the model and what it keeps.
    """
    manner, unknown = manner_of(model), unknown_layer(model)
    if unknown is not None:
        raise UncheckableError(
            f"{role} ({kind}) keeps {unknown} layers in its cache, which cannot be cut after a rejected draft; chains "
            "cannot use it.",
            role,
        )
    if feeds_otherwise(model):
        raise UncheckableError(
            f"{role} ({kind}) is fed other ids than those of the text when it generates, of which every one sees all "
            "others, so drafts cannot be checked with it; leave it out.",
            role,
        )
    odd = sorted(set(layer_types(model.config)) - ATTENTION_LAYERS)
    kinds = f" ({', '.join(odd)} layers)" if odd else ""
    if manner is Manner.NONE:
        raise UncheckableError(
            f"{role} ({kind}) keeps a recurrent state{kinds} that could not be put back to what it was before a draft "
            "when it was tried on a few tokens; chains cannot use it.",
            role,
        )
    # Classes of hybrids say so of themselves even where a config names attention layers alone.
    stateful = getattr(inner_model(model), "_is_stateful", False) and not names_layers(model.config)
    if manner is Manner.ATTENTION and (odd or stateful):
        raise UncheckableError(
            f"{role} ({kind}) keeps a recurrent state{kinds} outside of transformers' cache layers, where it cannot be "
            "put back after a rejected draft; chains cannot use it.",
            role,
        )


def layer_types(config: Any) -> list[str]:
    """The kinds of layers a model has, as its text config names them."""
    text = config.get_text_config(decoder=True)
    return list(getattr(text, "layer_types", None) or ["full_attention"])


def names_layers(config: Any) -> bool:
    """Whether a text config says of every layer which kind it is."""
    return bool(getattr(config.get_text_config(decoder=True), "layer_types", None))


def check_vocabularies(target: Any, assistant: Any, role: str) -> None:
    """Refuse an assistant with another tokenizer.

    Vocabularies of one tokenizer may be padded differently, and families rename or add special tokens between releases.
    Where both tokenizers can be read from local files, without running code that lies there, their words are compared;
    otherwise the numbers of rows and the special ids have to do.

    Raises:
        ValueError: names the assistant and the difference.
    """
    sizes = [vocabulary_size(model) for model in (target, assistant)]
    words, others = (_words_of(_name(model)) for model in (target, assistant))
    if words is not None and others is not None and _name(target) != _name(assistant):
        mismatched = not words.agree(others)
    else:
        mismatched = abs(sizes[0] - sizes[1]) > MAX_VOCABULARY_PADDING or _special_ids_differ(target, assistant)
        if min(sizes) <= MAX_VOCABULARY_PADDING:
            mismatched = mismatched or abs(sizes[0] - sizes[1]) > min(sizes) // 8
    if mismatched:
        raise ValueError(
            f"{role} ({_name(assistant) or type(assistant).__name__}, {sizes[1]} tokens) has another tokenizer than "
            f"the target ({_name(target) or type(target).__name__}, {sizes[0]} tokens); "
            "pass both tokenizers (tokenizer=, assistant_tokenizer=), or a level that shares the target's."
        )


def vocabulary_size(model: Any) -> int:
    """Rows of the model's output embedding: the V of its logits."""
    head = inner_model(model).get_output_embeddings()
    features = getattr(head, "out_features", None)
    if features is not None:  # asked first: a quantised layer makes its weight when it is looked at
        return int(features)
    weight = getattr(head, "weight", None)
    return int(
        weight.shape[0] if weight is not None and weight.ndim == 2 else model.config.get_text_config().vocab_size
    )


def _special_ids_differ(target: Any, assistant: Any) -> bool:
    configs = [model.config.get_text_config() for model in (target, assistant)]
    ends = [_as_set(getattr(config, "eos_token_id", None)) for config in configs]
    return bool(ends[0] and ends[1]) and not ends[0] & ends[1]


def _as_set(value: Any) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, (list, tuple)) else {int(value)}


def _name(model: Any) -> str:
    return str(getattr(inner_model(model), "name_or_path", "") or "")


@dataclass(frozen=True)
class _Words:
    """A tokenizer's vocabulary.

    Attributes:
        ids: by token; added: ids of tokens that stand beside the words of a text: special tokens and later additions.
    """

    ids: Mapping[str, int]
    added: frozenset[int]

    def agree(self, other: _Words) -> bool:
        """Whether every word has the same id in both, whatever is added in one of them."""
        added = self.added | other.added
        mine, theirs = (
            {token: place for token, place in words.ids.items() if place not in added} for words in (self, other)
        )
        return mine == theirs if mine and theirs else self.ids == other.ids


@lru_cache(maxsize=32)
def _words_of(name: str) -> _Words | None:
    """The tokenizer's vocabulary if it lies on this disk and needs no code from there, else None; never asks a hub."""
    if not name:
        return None
    try:
        # Said outright: transformers would otherwise ask at the terminal whether the folder's code may run.
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        return _Words(tokenizer.get_vocab(), frozenset(tokenizer.added_tokens_decoder))
    except Exception:
        # No tokenizer there, or none this environment can build: the sizes decide.
        return None
