# SPDX-License-Identifier: Apache-2.0
"""What `polyspec quantize` measures of its result: size, agreement, perplexity, and speed on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_polyspec.quantization.continuations import continuations
from hf_polyspec.quantization.measure import Comparison, SpeedRatio, compare, speed_ratios
from hf_polyspec.quantization.recovery import Recovery
from hf_polyspec.storage.atomic import write_json


@dataclass(frozen=True)
class Report:
    """The result of a quantisation.

    Attributes:
        bytes_original: Weights of the original in memory.
        bytes_checkpoint: Weight files of the checkpoint.
        greedy: Agreement along the original's greedy continuations of held-out prompts.
        sampled: The same along its sampled continuations.
        speed: Ratios to the original at several tokens a pass.
        threads: CPU threads they were measured with.
        recovered: Agreement on held-out text before and after `--recover`, where it was asked for.
    """

    bytes_original: int
    bytes_checkpoint: int
    greedy: Comparison
    sampled: Comparison
    speed: list[SpeedRatio]
    threads: int
    recovered: tuple[float, float] | None = None

    @property
    def slower(self) -> bool:
        """Whether it is slower than the original at every size measured."""
        return all(point.ratio <= 1.0 for point in self.speed)


def make_report(
    original: nn.Module,
    quantized: nn.Module,
    prompts: Sequence[Tensor],
    folder: Path,
    new_tokens: int = 64,
    recovery: Recovery | None = None,
) -> Report:
    """Measure a quantised copy against its original.

    Args:
        original: A causal LM.
        quantized: Its copy.
        prompts: Held-out prompts `[T]`.
        folder: The checkpoint.
        new_tokens: Tokens of each continuation.
        recovery: What recovering came to, to be reported.
    """
    compared = []
    for sample in (False, True):
        texts = continuations(original, prompts, new_tokens, seed=1, sample=sample)
        compared.append(compare(original, quantized, texts.texts, texts.starts))
    files = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    unique = {p.data_ptr(): p.numel() * p.element_size() for p in original.parameters()}
    return Report(
        sum(unique.values()),
        sum(path.stat().st_size for path in files),
        compared[0],
        compared[1],
        speed_ratios(original, quantized),
        torch.get_num_threads(),
        None if recovery is None else (recovery.before.agreement, recovery.after.agreement),
    )


def write_report(report: Report, folder: Path) -> None:
    """Write `quantization_report.json` beside the checkpoint."""
    write_json(folder / "quantization_report.json", asdict(report))


def print_report(report: Report, console: Console) -> None:
    """Print the table, and in plain words whether the result pays here."""
    table = Table(title="Quantised copy against the original", show_header=False)
    ratio = report.bytes_original / max(1, report.bytes_checkpoint)
    sizes = f"{report.bytes_checkpoint / 1e6:.0f} MB, was {report.bytes_original / 1e6:.0f} ({ratio:.1f}x smaller)"
    table.add_row("size", sizes)
    for kind, found in (("greedy", report.greedy), ("sampled", report.sampled)):
        table.add_row(
            f"agreement, {kind} text",
            f"{found.agreement:.3f} (same first choice {found.same_choice:.3f}, {found.tokens} tokens)",
        )
    if report.recovered is not None:
        before, after = report.recovered
        kept = "" if after > before else "; kept as it was"
        table.add_row("recovery, held-out text", f"{before:.3f} before, {after:.3f} after{kept}")
    found = report.sampled
    table.add_row("perplexity, sampled text", f"{found.perplexity:.2f}, original {found.perplexity_original:.2f}")
    for point in report.speed:
        table.add_row(
            f"speed at {point.rows} token{'s' * (point.rows > 1)} a pass",
            f"{point.ratio:.2f}x the original ({point.low:.2f} to {point.high:.2f}), {report.threads} threads",
        )
    console.print(table)
    if report.slower:
        console.print(
            "On this machine the copy is SLOWER than the original at every size: it is of no use as a middle here."
        )
    elif any(point.ratio <= 1.0 for point in report.speed):
        rows = ", ".join(str(point.rows) for point in report.speed if point.ratio <= 1.0)
        console.print(f"On this machine the copy is not faster than the original at {rows} tokens a pass.")
