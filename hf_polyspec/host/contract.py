# SPDX-License-Identifier: Apache-2.0
"""Whether a release of transformers that nobody tested yet keeps what this package relies on.

Asked once a process, at the first door that is used, and only of releases newer than the newest tested one. A Llama of
two layers is put together and run as a level is run, and through generate() as `decode` is reached. No generator,
default dtype or device, warning filter or config is touched: its numbers are written down, not drawn.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ..errors import ReleaseError
from ..exactness.context import Context, Prompt
from ..telemetry.counters import LevelStats
from . import release
from .modeling import LlamaConfig
from .runner import ModelRunner

_ROWS = 32
_TEXT = [3, 14, 15, 9, 26, 5, 3, 5]
_NEEDED = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache", "logits_to_keep")
_PREPARED = ("logits_processor", "stopping_criteria", "generation_config")

_verdicts: dict[str, str | None] = {}


def check_release() -> None:
    """Let a newer release than any tested one pass with one warning, or refuse it.

    Raises:
        ReleaseError: something that a chain relies on has changed; the sentence names it.
    """
    if not release.is_newer_than_tested():
        return
    name, tested = release.installed(), release.NEWEST_TESTED
    known = name in _verdicts
    if not known:
        _verdicts[name] = broken_promise()
    reason = _verdicts[name]
    if reason is not None:
        raise ReleaseError(
            f"transformers {name} is newer than {tested}, the newest release that hf_polyspec was tested with, and "
            f'{reason}; install "transformers<{_next_minor(tested)}".'
        )
    if not known:
        warnings.warn(
            f"transformers {name} is newer than {tested}, the newest release that hf_polyspec was tested with; what "
            "it relies on was tried and holds.",
            stacklevel=3,
        )


def broken_promise(kind: type[Any] = LlamaForCausalLM) -> str | None:
    """What the installed release does otherwise than this package expects, in a few words; None if nothing.

    Args:
        kind: the causal LM class that is tried, one that takes a `LlamaConfig`.
    """
    with torch.device("cpu"):  # whatever the default is while somebody loads a model
        return _broken(kind)


def _broken(kind: type[Any]) -> str | None:
    try:
        model = _tiny(kind)
    except Exception as error:
        return f"a model cannot be made as before ({type(error).__name__}: {error})"
    takes = release.forward_arguments(model)
    missing = [name for name in _NEEDED if name not in takes]
    if missing:
        return f"{kind.__name__}.forward has no argument {missing[0]!r} any more (it takes {', '.join(sorted(takes))})"
    if release.cache_argument(model) is None:
        return release.no_cache_argument(kind.__name__, model)
    for look in (_passes_agree, _generate_hands_over):
        try:
            reason = look(model)
        except Exception as error:
            reason = f"a forward pass or generate() fails now ({type(error).__name__}: {error})"
        if reason is not None:
            return reason
    return None


def _tiny(kind: type[Any]) -> Any:
    """A model of two layers in float32 whose parameters are sines: as good as random, and nothing is drawn."""
    config = LlamaConfig(
        vocab_size=_ROWS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = kind(config)
    count = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            steps = torch.arange(count, count + parameter.numel(), dtype=torch.float32, device="cpu")
            numbers = torch.sin(steps * steps * 0.37 + steps) * (0.3 if parameter.dim() > 1 else 0.1)
            numbers = numbers.reshape(parameter.shape) + (1.0 if parameter.dim() == 1 else 0.0)
            setattr(module, name, nn.Parameter(numbers, requires_grad=False))
            count += parameter.numel()
        if any(buffer.device.type == "meta" for _, buffer in module.named_buffers(recurse=False)):
            # Angles and the like are computed from the config, on the device of the moment.
            with torch.device("cpu"):
                fresh = type(module)(config)
            for name, buffer in fresh.named_buffers(recurse=False):
                module.register_buffer(name, buffer, persistent=False)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


@torch.no_grad()
def _passes_agree(model: Any) -> str | None:
    """A pass over cached tokens, a rolled-back one among them, must see what a pass over the whole text sees."""
    device = torch.device("cpu")
    whole = model(input_ids=torch.tensor([_TEXT], device=device), use_cache=False).logits[0]
    stats = LevelStats("probe", 0)
    runner = ModelRunner(model, "probe")
    prompt = Prompt(4, None, torch.arange(4, device=device)[None])
    first, wrong, right = _TEXT[:4], [1, 2, 4], _TEXT[4:]
    runner.run(Context([first], prompt), [wrong], stats)
    seen = runner.run(Context([first], prompt), [right[:-1]], stats).logits[0]
    if seen.shape[0] != len(right) or not torch.allclose(seen, whole[3:7], atol=1e-4, rtol=1e-4):
        return "a cache that was rolled back gives other logits than the text itself"
    recorded = model(input_ids=torch.tensor([_TEXT], device=device), output_hidden_states=True, return_dict=True)
    if len(recorded.hidden_states) != 3:
        return f"a model of two layers returns {len(recorded.hidden_states)} hidden states instead of 3"
    return None


def _generate_hands_over(model: Any) -> str | None:
    """generate() must call a `custom_generate` with what `decode` reads."""
    told: dict[str, Any] = {}

    def loop(asked: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
        told.update(prepared, model=asked, input_ids=input_ids)
        return input_ids

    ids = torch.tensor([_TEXT], device=torch.device("cpu"))
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, custom_generate=loop)
    if not told:
        return "generate() no longer calls a custom_generate callable"
    missing = [name for name in _PREPARED if name not in told]
    if missing:
        return f"generate() no longer hands {missing[0]} to a custom_generate callable"
    if told["model"] is not model or told["input_ids"].tolist() != [_TEXT]:
        return "generate() hands other things to a custom_generate callable than the model and its ids"
    cache = release.cache_of({name: value for name, value in told.items() if name not in _PREPARED})
    if not isinstance(cache, Cache) or int(cache.get_seq_length()) != 0:
        return "generate() no longer prepares an empty cache"
    if told["generation_config"].max_length != len(_TEXT) + 3:
        return "generate() no longer counts max_length in the generation config it prepares"
    return None


def _next_minor(version: str) -> str:
    major, minor = version.split(".")[:2]
    return f"{major}.{int(minor) + 1}"
