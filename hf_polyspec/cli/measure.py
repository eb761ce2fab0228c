# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure`: one door to every measurement."""

from __future__ import annotations

from typing import Annotated

import typer


def measure(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which; without one, a list of them.")] = None,
) -> None:
    """One of the measurements whose figures stand in the documentation; NAME --help shows its options."""
    from ..bench.measurements.registry import MEASUREMENTS, load_measurement

    if name in (None, "-h", "--help"):
        typer.echo("Usage: polyspec measure NAME [OPTIONS]\n")
        for each, measurement in MEASUREMENTS.items():
            typer.echo(f"  {each:18}{measurement.help}")
        return
    load_measurement(str(name))(context.args)
