# SPDX-License-Identifier: Apache-2.0
"""What commands that run a chain share: its words on the command line, and loading it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

_CHAIN: dict[str, tuple[str, Any]] = {
    "block_size": (
        "polyspec_block_size",
        Annotated[int | None, typer.Option(help="Tokens a middle collects before the level above checks them.")],
    ),
    "direct_tokens": (
        "polyspec_direct_tokens",
        Annotated[int | None, typer.Option(help="Suffix drafts pass a middle by from this length on; 0 for never.")],
    ),
    "draft_tokens": (
        "num_assistant_tokens",
        Annotated[int | None, typer.Option(help="Tokens a drafting model proposes a round.")],
    ),
    "tree_tokens": (
        "polyspec_tree_tokens",
        Annotated[int | None, typer.Option(help="Most tokens of the trees of an EAGLE head; 0 for chains.")],
    ),
    "tree_depth": (
        "polyspec_tree_depth",
        Annotated[int | None, typer.Option(help="Most tokens of a path of such a tree.")],
    ),
    "tree_top_k": (
        "polyspec_tree_top_k",
        Annotated[int | None, typer.Option("--tree-top-k", help="Continuations followed at each depth of it.")],
    ),
    "draft_vocabulary": (
        "polyspec_draft_vocabulary",
        Annotated[str | None, typer.Option(help="Ids an EAGLE head chooses from: a number, or auto.")],
    ),
    "draft_temperature": (
        "polyspec_draft_temperature",
        Annotated[float | None, typer.Option(help="Below 1: draw likelier drafts than a drafter's own law would.")],
    ),
    "copies": (
        "polyspec_draft_copies",
        Annotated[
            bool | None,
            typer.Option(
                "--copies/--no-copies", help="Mix what is known from the text and from rejected guesses into a head's."
            ),
        ],
    ),
    "confidence": (
        "assistant_confidence_threshold",
        Annotated[float | None, typer.Option(help="0 to 1: a draft ends where the drafter is less sure.")],
    ),
    "schedule": (
        "num_assistant_tokens_schedule",
        Annotated[
            str | None, typer.Option(help="constant, or heuristic: draft more after all was accepted, else less.")
        ],
    ),
}
"""The options of `demo` and `generate` for the chain: the word of the command line, the option behind it, its kind."""


def takes_chain(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `chain` is replaced by the words of `_CHAIN`; it gets the options that were given.

    Args:
        command: with a parameter `chain`, a dict of options that are checked before the command is called.
    """
    own = signature(command, eval_str=True)
    words = [
        Parameter(word, Parameter.KEYWORD_ONLY, default=None, annotation=kind) for word, (_, kind) in _CHAIN.items()
    ]
    shown = [each for one in own.parameters.values() for each in (words if one.name == "chain" else [one])]

    def run(**given: Any) -> None:
        chain = {option: given.pop(word) for word, (option, _) in _CHAIN.items()}
        chain["polyspec_draft_vocabulary"] = _number_or_word(chain["polyspec_draft_vocabulary"])
        command(**given, chain=chain_options(**chain))

    # typer reads a command's options from these.
    wrapped: Any = functools.wraps(command)(run)
    wrapped.__signature__ = own.replace(parameters=shown)
    wrapped.__annotations__ = {one.name: one.annotation for one in shown}
    return cast(Callable[..., None], wrapped)


def chain_options(**given: Any) -> dict[str, Any]:
    """The options of the chain that were given, checked before a model is loaded."""
    from ..generation.options import PolySpecOptions

    options = {name: value for name, value in given.items() if value is not None}
    PolySpecOptions(**options)
    return options


def _number_or_word(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdigit() else text


def words_of(assistant: list[str] | None, plan: Path | None = None) -> list[str]:
    """The assistants that a command line names; "auto" chooses where it names none.

    Raises:
        ValueError: there is a plan, which is of assistants that are named, and none is.
    """
    from ..models.assistants import AUTO

    words = assistant or [AUTO]
    if plan is not None and AUTO in words:
        raise ValueError("--plan chooses among assistants: name those that it was made for, each with --assistant.")
    return words


def load_chain(
    console: Console,
    model: str | None,
    assistant: list[str],
    device: str,
    dtype: str,
    html: Path | None,
    pack: bool,
) -> tuple[Any, Any, list[Any], list[str]]:
    """Target, tokenizer, assistants and what to call them."""
    quiet()
    from ..generation.chain import check_assistants
    from ..levels.names import short_name
    from ..models.assistants import AUTO, load_assistant, named_assistants
    from ..models.by_name import check_device, load_model, load_tokenizer, read_dtype
    from ..models.packaged import PACKAGE, first_time
    from ..quantization import pack as pack_model
    from .demo import DEFAULT_MODEL

    name = model or DEFAULT_MODEL
    words = named_assistants(assistant)
    check_device(device)
    read_dtype(dtype)
    if html is not None and not html.absolute().parent.is_dir():
        raise ValueError(f"The folder of {html} does not exist.")
    with console.status(f"loading {name}{first_time(name)}"):
        target, tokenizer = load_model(name, dtype, device), load_tokenizer(name)
        if pack:
            pack_model(target)
        assistants = words if words == [AUTO] else [load_assistant(word, target, dtype, device) for word in words]
    if words != [AUTO]:
        check_assistants(target, assistants)
    if name == PACKAGE:
        console.print(
            f"{short_name(str(target.name_or_path))}, whose published weights here come from a 4-bit file (Q4_1).",
            style="dim",
            highlight=False,
        )
    return target, tokenizer, assistants, [short_name(word) for word in words]


def quiet() -> None:
    """Loading bars and advice of the libraries below would break up what is printed here."""
    from ..host.generation import quiet as lower

    lower(errors_only=True)
