# SPDX-License-Identifier: Apache-2.0
"""Commands that live in other rooms of the package, by name, so that listing them imports nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PACKAGE = "hf_polyspec"


@dataclass(frozen=True)
class Command:
    """Where a command is.

    Attributes:
        module: the module that defines it.
        function: its name there, a typer command function.
        extra: the optional dependencies it needs.
        help: one line.
    """

    module: str
    function: str
    extra: str
    help: str


COMMANDS = {
    "bench": Command(
        f"{PACKAGE}.bench.command", "bench_command", "bench", "Run Spec-Bench on plain decoding, the peers and chains."
    ),
    "bench-report": Command(
        f"{PACKAGE}.bench.command", "report_command", "bench", "Make the report of bench runs from their records."
    ),
    "plan": Command(
        f"{PACKAGE}.planning.command", "plan_command", "planning", "Which chain is quickest here, and why."
    ),
    "score": Command(
        f"{PACKAGE}.metrics.command", "score_command", "metrics", "Score bench outputs: quality beside plain decoding."
    ),
    "train-eagle": Command(
        f"{PACKAGE}.eagle.training.command", "train_eagle", "training", "Train an EAGLE head for a model."
    ),
    "export": Command(
        f"{PACKAGE}.cli.export", "export_command", "training", "Write an EAGLE head for vLLM, SGLang and others."
    ),
    "push": Command(f"{PACKAGE}.cli.push", "push_command", "training", "Push a head, a copy or a recipe to the Hub."),
    "serve": Command(f"{PACKAGE}.cli.serve", "serve_command", "serve", "Answer OpenAI's clients with a chain."),
    "quantize": Command(
        f"{PACKAGE}.cli.quantize", "quantize_command", "quantization", "Write a quantised copy of a model."
    ),
}


class MissingExtraError(ImportError):
    """A command's optional dependencies are not installed; the message names the extra."""


def load_command(name: str) -> Callable[..., Any]:
    """Import a command's function.

    Raises:
        MissingExtraError: a package it needs is not installed.
    """
    command = COMMANDS[name]
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(command.module), command.function)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == PACKAGE:
            raise
        missing = (error.name or "it imports").split(".")[0]
        raise MissingExtraError(
            f"polyspec {name} needs the package {missing}, which comes with the extra {command.extra!r}: "
            f'pip install "{PACKAGE}[{command.extra}]".'
        ) from error
    return found
