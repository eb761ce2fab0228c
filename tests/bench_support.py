# SPDX-License-Identifier: Apache-2.0
"""What the tests of `polyspec bench` share: invented questions and one small run's options."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from hf_polyspec.cli import app

CATEGORIES = ("writing", "translation", "summarization", "qa", "math_reasoning", "rag")
WORDS = ["river", "stone", "lamp", "window", "garden", "letter", "morning", "kettle", "ladder", "paper"]


def invented(number: int, turns: int) -> list[str]:
    return [" ".join(WORDS[(number * 3 + turn + i * 7) % 10] for i in range(4)) for turn in range(turns)]


def write_questions(path: Path, per_category: int = 1) -> Path:
    """A question file in Spec-Bench's format; the first category has two turns."""
    lines = []
    for number in range(per_category * len(CATEGORIES)):
        category = CATEGORIES[number % len(CATEGORIES)]
        turns = invented(number, 2 if category == "writing" else 1)
        fields = {"question_id": number + 1, "category": category, "turns": turns, "reference": [["lamp"], "4"]}
        lines.append(json.dumps(fields))
    path.write_text("\n".join(lines) + "\n")
    return path


def bench(*arguments: str) -> tuple[int, str]:
    """Exit code and what was said."""
    result = CliRunner().invoke(app, ["bench", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output + result.stderr


def run_arguments(models: dict[str, str], folder: Path) -> list[str]:
    """The options of that run."""
    chosen = ["plain", "hf:prompt-lookup", "hf:assisted:small", "polyspec:small,suffix@block=4,draft=3"]
    return [
        *("--model", models["target"], "--questions", models["questions"], "--output", str(folder)),
        *("--assistant", f"small={models['small']}", "--assistant", "suffix", "--methods", " ".join(chosen)),
        *("--max-new-tokens", "8", "--warm-up", "0", "--batch-size", "1,2"),
    ]
