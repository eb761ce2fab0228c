# SPDX-License-Identifier: Apache-2.0
"""`polyspec profile`: what "auto" has measured on this machine, to look at and to forget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..auto.profile import Key

app = typer.Typer(help='What assistant_models="auto" has measured here: list, show, forget.', no_args_is_help=True)


@app.command("list")
def list_profiles() -> None:
    """Every profile, the newest first: its name, what it is of, and what was chosen."""
    from ..auto.profile import folder, kept

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("profile", "model", "dtype", "device", "threads", "date"):
        table.add_column(heading, no_wrap=True)
    table.add_column("chosen", overflow="fold")
    for path, one in kept():
        if one is None:
            table.add_row(path.stem, "damaged: forget it, and the next call measures anew")
            continue
        key = one.key
        told = (path.stem, one.model, key.dtype, key.device, str(key.threads), one.date, one.line)
        table.add_row(*(cell.replace("[", r"\[") for cell in told))
    if table.row_count:
        console = Console()
        (console if console.is_terminal else Console(width=160)).print(table)
    else:
        typer.echo(f"There are no profiles in {folder()}.")


@app.command("show")
def show_profile(
    name: Annotated[str, typer.Argument(help="Of the profile, or its beginning; or of the model.")],
) -> None:
    """One profile as it is on disk: key, passes, what was chosen, what was left out and why."""
    typer.echo(json.dumps(json.loads(_found(name)[0].read_text(encoding="utf-8")), indent=2))


@app.command("forget")
def forget_profiles(
    name: Annotated[str | None, typer.Argument(help="Of a profile, or its beginning; or of a model.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Forget all of them.")] = False,
) -> None:
    """Delete profiles; the next call of "auto" measures anew."""
    from ..auto.profile import forget

    if (name is None) != everything:
        raise ValueError("polyspec profile forget takes the name of a profile or of a model, or --all.")
    if name is not None:
        _found(name)
    gone = forget(name)
    typer.echo("\n".join(f"forgot {path.stem}" for path in gone) or "There was nothing to forget.")


def of(name: str) -> list[tuple[str, str]]:
    """What "auto" has chosen for a model and would take here, now: pairs of a label and a line, for `polyspec inspect`.

    Profiles of other versions or thread counts stay on the disk, and `polyspec profile list` shows them.
    """
    from ..auto.profile import kept
    from ..levels.names import short_name
    from ..models.by_name import resolve

    called = short_name(resolve(name)[0])
    return [
        (f"auto, {one.key.dtype} on {one.key.device}, {_packing(one.key)}, profile {path.stem[:6]}", one.line)
        for path, one in kept()
        if one is not None and one.model == called and one.key.holds_here
    ]


def _packing(key: Key) -> str:
    """What a profile says of packing, in a word or two."""
    from ..auto.source import MAY, PACKED

    if not key.pack:
        return "not to be packed"
    return {PACKED: "packed by you", MAY: "packed if that pays"}.get(key.layout, key.layout)


def _found(name: str) -> list[Path]:
    """Files of profiles of this name.

    Raises:
        ValueError: there is none.
    """
    from ..auto.profile import folder, kept

    found = [path for path, one in kept() if path.stem.startswith(name) or (one is not None and one.model == name)]
    if not found:
        raise ValueError(f"there is no profile {name!r} in {folder()}; polyspec profile list shows them.")
    return found
