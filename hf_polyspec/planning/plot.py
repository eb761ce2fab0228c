# SPDX-License-Identifier: Apache-2.0
"""Pictures of a plan: speed by block size and draft length, and where the time of a round goes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..storage.atomic import replacing
from .by_batch import best_by_batch
from .candidates import describe_chain, describe_sizes
from .planner import Planned
from .search import Candidate, best_of_each

FORMATS = (".png", ".svg")
_BARS = 8


def draw_plan(planned: Planned, path: str | Path) -> list[Path]:
    """Draw a plan twice, as a PNG and as an SVG.

    Args:
        planned: the search; what was measured of its candidates is drawn beside what was predicted.
        path: the file; its suffix is replaced by .png and .svg.

    Returns:
        The files written.

    Raises:
        ValueError: the folder does not exist.
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist.")
    lines = 3 if planned.wish.batches else 2
    figure = Figure(figsize=(12, 4.25 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    upper = figure.add_subplot(lines, 2, 1), figure.add_subplot(lines, 2, 2)
    sized = _sized(planned)
    _by_size(upper[0], planned, sized, "block")
    _by_size(upper[1], planned, sized, "draft")
    _rounds(figure.add_subplot(lines, 1, 2), planned)
    if planned.wish.batches:
        _batches(figure.add_subplot(lines, 1, 3), planned)
    synthetic = any(getattr(level.member, "synthetic", False) for level in planned.levels)
    title = f"{planned.measured.names[0]}, temperature {planned.wish.temperature:g}"
    figure.suptitle(title + (" - with a SYNTHETIC level" if synthetic else ""))
    written = []
    for suffix in FORMATS:
        file = path.with_suffix(suffix)
        with replacing(file) as place:
            figure.savefig(place, format=suffix[1:], metadata={"Date": None} if suffix == ".svg" else None)
        written.append(file)
    return written


def require_matplotlib() -> None:
    """Refuse to draw where matplotlib is not installed.

    Raises:
        ImportError: it is not; the message says how to get it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('pictures need matplotlib: pip install "hf_polyspec[planning]".')


def _sized(planned: Planned) -> list[Candidate]:
    """All candidates like the one shown, sizes apart: the best with a middle, else the best of all."""
    with_block = next((c for c in planned.candidates if c.chain.block), None)
    shown = with_block or next((c for c in planned.candidates if not c.chain.plain), planned.best)
    kind = shown.chain.levels, shown.chain.direct
    return [c for c in planned.candidates if (c.chain.levels, c.chain.direct) == kind]


def _by_size(axes: Any, planned: Planned, candidates: Sequence[Candidate], axis: str) -> None:
    """Lines of predicted and dots of measured tokens/s; one line for each value of the other size."""
    other = "draft" if axis == "block" else "block"
    lines: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        chain = candidate.chain
        if chain.tree is not None:
            if axis == "block":
                lines.setdefault(f"tree of {chain.tree.tokens}", []).append(candidate)
        else:
            lines.setdefault(f"{other} {getattr(chain, other)}", []).append(candidate)
    best = sorted(lines, key=lambda name: min(c.predicted.seconds for c in lines[name]))[:6]
    for number, name in enumerate(best):
        points = sorted(lines[name], key=lambda c: getattr(c.chain, axis))
        places = [getattr(c.chain, axis) for c in points]
        label = f"{name}, predicted" if getattr(points[0].chain, other) or points[0].chain.tree else "predicted"
        axes.plot(places, [c.predicted.tokens_per_second for c in points], color=f"C{number}", marker=".", label=label)
        run = [c for c in points if c.measured is not None]
        if run:
            speeds = [c.measured for c in run]
            axes.plot([getattr(c.chain, axis) for c in run], speeds, f"C{number}o", markersize=9, label="measured")
    plain = planned.plain.predicted.tokens_per_second
    axes.axhline(plain, color="grey", linestyle="--", label="plain generate()")
    axes.set_xlabel("block size" if axis == "block" else "draft length")
    axes.set_ylabel("tokens/s")
    axes.set_title(describe_chain(candidates[0].chain, planned.measured.names), fontsize="medium")
    axes.legend(fontsize="x-small")


def _rounds(axes: Any, planned: Planned) -> None:
    """A bar for the best sizes of every subset: seconds of a target round, by level."""
    shown = best_of_each(planned.candidates)[:_BARS]
    names = planned.measured.names
    left = [0.0] * len(shown)
    labels = [f"{describe_chain(c.chain, names)}\n{describe_sizes(c.chain)}" for c in shown]
    for place, name in enumerate(names):
        widths = [_milliseconds(c, place) for c in shown]
        axes.barh(labels, widths, left=left, label=name, color=f"C{place}")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    rest = [1e3 * max(0.0, c.predicted.seconds - sum(c.predicted.by_level)) / c.predicted.rounds[0] for c in shown]
    axes.barh(labels, rest, left=left, label="prompt and overhead", color="lightgrey")
    axes.invert_yaxis()
    axes.set_xlabel("ms a round of the target, predicted")
    axes.tick_params(axis="y", labelsize="small")
    axes.legend(fontsize="x-small")


def _batches(axes: Any, planned: Planned) -> None:
    """A line for the best sizes of every subset: speed in that of plain decoding, by rows of the batch."""
    found = best_by_batch(planned.levels, planned.measured, planned.candidates)
    names = planned.measured.names
    lines: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for at in found:
        for one in at.each:
            lines.setdefault(one.chain.levels, []).append((at.rows, at.gain(one)))
    for levels, points in list(lines.items())[:_BARS]:
        chain = next(one.chain for one in found[0].each if one.chain.levels == levels)
        rows, gains = zip(*points, strict=True)
        axes.plot(rows, gains, marker=".", label=describe_chain(chain, names))
    axes.axhline(1.0, color="grey", linestyle="--")
    axes.set_xticks([at.rows for at in found])
    axes.set_xlabel("rows of the batch")
    axes.set_ylabel("speed against plain, predicted")
    axes.legend(fontsize="x-small")


def _milliseconds(candidate: Candidate, place: int) -> float:
    if place not in candidate.chain.levels:
        return 0.0
    at = candidate.chain.levels.index(place)
    return 1e3 * candidate.predicted.by_level[at] / candidate.predicted.rounds[0]
