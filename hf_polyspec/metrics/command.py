# SPDX-License-Identifier: Apache-2.0
"""`polyspec score`: the quality of bench outputs, plain and speculative side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..storage.atomic import write_text
from .records import read_records
from .report import show, to_json, to_markdown
from .scoring import score_records

PIPED_WIDTH = 170
WRITERS = {".json": to_json, ".md": to_markdown}


def score_command(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Outputs of polyspec bench (JSON lines); several files count as one run.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ],
    baseline: Annotated[str, typer.Option(help="Method the others are compared with.")] = "plain",
    modules: Annotated[
        Path | None,
        typer.Option(
            help="Folder with local copies of evaluate's metrics (rouge/rouge.py and so on), "
            "for machines without network.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap and the randomisation test.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Also write the report here, as .json or .md.", dir_okay=False)
    ] = None,
) -> None:
    """Score bench outputs: answer quality and token equality of every method beside plain decoding.

    Translation by BLEU, summaries by ROUGE, questions by F1 and exact match, mathematics by the exact
    match of the final number; each with the difference, its bootstrap interval and a paired test.
    """
    if output is not None and output.suffix not in WRITERS:
        raise typer.BadParameter(f"--output must end in .json or .md, not {output.suffix or 'nothing'!r}.")
    try:
        records, notes = read_records(files)
        report = score_records(records, baseline, modules, confidence, resamples, seed)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    report.notes[:0] = notes
    console = Console()
    # A pipe or a log has no width of its own; 80 columns would break every row.
    show(report, console if console.is_terminal else Console(width=PIPED_WIDTH))
    if output is not None:
        write_text(output, WRITERS[output.suffix](report))
