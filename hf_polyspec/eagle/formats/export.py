# SPDX-License-Identifier: Apache-2.0
"""Writing a head for other programs: vLLM, SGLang, EAGLE's own code, the speculators library."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.features import bind, view_of
from hf_polyspec.eagle.formats.portable import (
    Tensors,
    head_switches,
    layer_config,
    official_features,
    portable_tensors,
    reads_last_state_only,
    renamed,
    speculators_eagle1,
    speculators_eagle3,
    stores_lm_head,
)
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.storage.folders import filling

_EAGLE1_OFFICIAL = (
    ("norm.", "lm_head_layernorm."),
    ("layers.0.input_layernorm.", "hidden_layernorm."),
)
_EAGLE1_SPECULATORS = (
    ("norm.", "pre_lm_head_layernorm."),
    ("embed_layernorm.", "embedding_layernorm."),
    ("layers.0.", "transformer."),
    ("fc.", "fusion_fc."),
)
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "*.index.json", "pytorch_model*.bin")


@dataclass(frozen=True)
class Order:
    """What an export was asked for beyond the head and the program.

    Attributes:
        verifier: How the program is to find the target, or `None` for the bound target's own name.
        speculative_tokens: Tokens a server should draft per round.
        overwrite: Replace a checkpoint that is already there.
    """

    verifier: str | None
    speculative_tokens: int
    overwrite: bool


def export_head(
    head: EagleHead,
    folder: str | os.PathLike[str],
    to: str,
    *,
    target: PreTrainedModel | None = None,
    verifier: str | None = None,
    speculative_tokens: int = 3,
    overwrite: bool = False,
) -> Path:
    """Writes a head as another program reads it.

    Args:
        head: The head; it stays as it is.
        folder: Where to write `config.json` and `model.safetensors`.
        to: `"vllm"`, `"sglang"`, `"speculators"`, or `"eagle"` for the code of EAGLE's authors.
        target: The model the head drafts for, where the head is not bound to it: the file then holds what the program
            cannot take from the target itself (`needs_rows`), and names it.
        verifier: Hub id or folder under which the program finds the target; default: the target's own name. vLLM and
            speculators insist on one for EAGLE-3 heads.
        speculative_tokens: Tokens a server should draft per round, where the layout says so.
        overwrite: Replace a checkpoint that is already there.

    Returns:
        The folder.

    Raises:
        ValueError: If the program does not know such heads, is not known itself, or needs what is not given; in one
            sentence.
        FileExistsError: If there is a checkpoint already.
        OSError: If the folder cannot be written; it is then as it was.
    """
    if to not in DESTINATIONS:
        raise ValueError(f"to must be one of {', '.join(DESTINATIONS)}, got {to!r}.")
    if target is not None:
        head = bind(view_of(head), target)
    return DESTINATIONS[to](head, folder, Order(verifier, speculative_tokens, overwrite))


def needs_rows(config: EagleHeadConfig, to: str) -> bool:
    """Whether an exported head's file holds rows of its target's lm_head or embedding, so that it must be loaded.

    Args:
        config: The head's config.
        to: As in `export_head`.
    """
    eagle1 = config.algorithm == "eagle1"
    if to == "eagle":
        # EAGLE's own code fills what a file leaves out with random numbers, but for an EAGLE-3 embedding
        return not (config.own_embedding if eagle1 else config.own_lm_head)
    if to == "speculators" and not eagle1:
        # its loader (0.9, transformers 5.18 and 5.19) fills it with zeros, which it then takes for the file's
        return not (config.own_embedding and config.own_lm_head)
    return stores_lm_head(config) and not config.own_lm_head


def export_official(
    head: EagleHead,
    folder: str | os.PathLike[str],
    *,
    architectures: Sequence[str] | None = None,
    embedding: bool | None = None,
    lm_head: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a head in the layout of the EAGLE authors, as vLLM and SGLang read it.

    Args:
        head: The head; bound to its target if the file needs what the head borrows.
        folder: Where to write `config.json` and `model.safetensors`.
        architectures: For the config; default `LlamaForCausalLM` (EAGLE-1; SGLang wants
            `LlamaForCausalLMEagle`) or `LlamaForCausalLMEagle3`, which both know.
        embedding: Whether to store the embedding; default: for EAGLE-1 if it is at hand (the official files
            have it), for EAGLE-3 only if it is the head's own.
        lm_head: Whether to store the lm_head; default: if it is the head's own, or the head scores fewer ids than its
            target (EAGLE-3). Servers share the target's where the file has none; EAGLE's own code does not.
        overwrite: Replace a checkpoint that is already there.

    Returns:
        The folder.

    Raises:
        ValueError: If the layout cannot hold this head, or what the file needs of the target is not bound.
        FileExistsError: If there is a checkpoint already.
        OSError: If the folder cannot be written; it is then as it was.
    """
    if embedding is None:
        embedding = bool(head.config.own_embedding or (head.config.algorithm == "eagle1" and head.is_bound))
    if lm_head is None:
        lm_head = stores_lm_head(head.config)
    default = "LlamaForCausalLM" if head.config.algorithm == "eagle1" else "LlamaForCausalLMEagle3"
    return _official(head, Path(folder), list(architectures or [default]), embedding, lm_head, overwrite)


def export_speculators(
    head: EagleHead,
    folder: str | os.PathLike[str],
    *,
    verifier: str | None = None,
    verifier_architectures: Sequence[str] = (),
    speculative_tokens: int = 3,
    embedding: bool | None = None,
    lm_head: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a head in the layout of the speculators library, which `vllm serve` takes directly.

    Args:
        head: The head; bound to its target if the file needs what the head borrows.
        folder: Where to write `config.json` and `model.safetensors`.
        verifier: Hub id or folder of the target, by which readers load it; default: the bound target's name.
        verifier_architectures: The target's architectures; default: the bound target's.
        speculative_tokens: Tokens a server should draft per round.
        embedding: Whether to store the embedding; default: only if it is the head's own.
        lm_head: Whether to store the lm_head; default: as for `export_official`. vLLM shares the target's where the
            file has none; the speculators library itself, of which this is the layout, does not.
        overwrite: Replace a checkpoint that is already there.

    Returns:
        The folder.

    Raises:
        ValueError: If the layout cannot hold this head, what the file needs of the target is not bound, or nothing
            names the target.
        FileExistsError: If there is a checkpoint already.
        OSError: If the folder cannot be written; it is then as it was.
    """
    config = head.config
    eagle1 = config.algorithm == "eagle1"
    # what the layout cannot hold is refused first
    layout = speculators_eagle1(config) if eagle1 else speculators_eagle3(config)
    written: dict[str, Any] = {
        "architectures": ["EagleSpeculator" if eagle1 else "Eagle3DraftModel"],
        "speculators_model_type": "eagle" if eagle1 else "eagle3",
        "speculators_version": "0.1.0" if eagle1 else "0.3.0",
        "speculators_config": {
            "algorithm": "eagle" if eagle1 else "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": speculative_tokens}],
            "verifier": _verifier(head, verifier, verifier_architectures),
        },
        "transformer_layer_config": layer_config(head),
        "torch_dtype": str(head.dtype).removeprefix("torch."),
        **layout,
    }
    embedding = bool(config.own_embedding) if embedding is None else embedding
    lm_head = stores_lm_head(config) if lm_head is None else lm_head
    tensors = portable_tensors(head, embedding, lm_head)
    return _write(Path(folder), written, renamed(tensors, _EAGLE1_SPECULATORS) if eagle1 else tensors, overwrite)


def _official(
    head: EagleHead,
    folder: Path,
    architectures: list[str],
    embedding: bool,
    lm_head: bool,
    overwrite: bool,
    sglang: bool = False,
) -> Path:
    config = head.config
    if config.qk_norm:
        raise ValueError("The official layout has no per-head norms (`qk_norm`); use the speculators layout.")
    written = {"architectures": architectures, **layer_config(head), **head_switches(config)}
    if config.algorithm == "eagle1":
        written |= {"bias": config.fc_bias, "qkv_bias": config.attention_bias}
    else:
        written |= official_features(config, lm_head, sglang)
    tensors = portable_tensors(head, embedding, lm_head)
    if config.algorithm == "eagle1":
        tensors = renamed(tensors, _EAGLE1_OFFICIAL)
    elif config.num_hidden_layers == 1:
        tensors = renamed(tensors, (("layers.0.", "midlayer."),))
    return _write(folder, written, tensors, overwrite)


# -- the programs --------------------------------------------------------------------------------------------


def _for_vllm(head: EagleHead, folder: str | os.PathLike[str], order: Order) -> Path:
    if head.config.algorithm == "eagle3" and not reads_last_state_only(head.config):
        return _in_speculators(head, folder, order, whole=None)
    _refuse(head, "vLLM", ("fc_bias", "embed_norm", "fused_norm", "final_norm"))
    return export_official(head, folder, overwrite=order.overwrite)


def _for_sglang(head: EagleHead, folder: str | os.PathLike[str], order: Order) -> Path:
    _refuse(head, "SGLang", ("embed_norm", "fused_norm", "final_norm"))
    config = head.config
    architectures = ["LlamaForCausalLMEagle" if config.algorithm == "eagle1" else "LlamaForCausalLMEagle3"]
    own, rows = bool(config.own_embedding), stores_lm_head(config)
    return _official(head, Path(folder), architectures, own, rows, order.overwrite, sglang=True)


def _for_speculators(head: EagleHead, folder: str | os.PathLike[str], order: Order) -> Path:
    return _in_speculators(head, folder, order, whole=True if head.config.algorithm == "eagle3" else None)


def _in_speculators(head: EagleHead, folder: str | os.PathLike[str], order: Order, whole: bool | None) -> Path:
    return export_speculators(
        head,
        folder,
        verifier=order.verifier,
        speculative_tokens=order.speculative_tokens,
        embedding=whole,
        lm_head=whole,
        overwrite=order.overwrite,
    )


def _for_eagle(head: EagleHead, folder: str | os.PathLike[str], order: Order) -> Path:
    config = head.config
    eagle1 = config.algorithm == "eagle1"
    _refuse(head, "EAGLE's own code", ("embed_norm", "fused_norm", "final_norm"))
    beyond = (
        "norm_before_residual",
        "norm_before_fc",
        "fc_norm",
        "norm_output",
        "sliding_window",
        "attention_out_bias",
    )
    strange = [name for name in beyond if getattr(config, name)]
    if config.num_hidden_layers > 1:
        strange.append("num_hidden_layers")
    if not eagle1 and (config.num_features != 3 or reads_last_state_only(config)):
        strange.append("feature_layer_ids")
    if strange:
        raise ValueError(f"EAGLE's own code knows no heads with `{'`, `'.join(strange)}`; vLLM and SGLang may.")
    embedding = eagle1 or config.own_embedding
    return export_official(head, folder, embedding=embedding, lm_head=not eagle1, overwrite=order.overwrite)


DESTINATIONS: dict[str, Callable[[EagleHead, str | os.PathLike[str], Order], Path]] = {
    "vllm": _for_vllm,
    "sglang": _for_sglang,
    "eagle": _for_eagle,
    "speculators": _for_speculators,
}


def _refuse(head: EagleHead, program: str, names: Sequence[str]) -> None:
    """Raises where an EAGLE-1 head has something that a program does not know."""
    strange = [name for name in names if head.config.algorithm == "eagle1" and getattr(head.config, name)]
    if strange:
        raise ValueError(f"{program} knows no EAGLE-1 heads with `{'`, `'.join(strange)}`.")


def _verifier(head: EagleHead, name: str | None, architectures: Sequence[str]) -> dict[str, Any]:
    bound = head.borrowed
    name = name or bound.name
    if not name:
        raise ValueError(
            "The layout names the model that a head drafts for, by which vLLM and speculators load it: give verifier "
            "(its hub id or folder), or a target that was loaded by name."
        )
    if os.path.isdir(name):
        name = os.path.abspath(name)
    return {"name_or_path": name, "architectures": list(architectures or bound.architectures)}


def _write(folder: Path, config: dict[str, Any], tensors: Tensors, overwrite: bool) -> Path:
    there = [*folder.glob("config.json"), *(path for pattern in _WEIGHTS for path in folder.glob(pattern))]
    if there and not overwrite:
        taken = " and ".join(sorted({path.name for path in there}))
        raise FileExistsError(f"{folder} already holds {taken}; pass overwrite=True to replace them.")
    with filling(folder, replaces=_WEIGHTS) as place:
        stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (place / "config.json").write_text(text, encoding="utf-8")
    return folder
