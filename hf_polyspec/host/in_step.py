# SPDX-License-Identifier: Apache-2.0
"""Whether the rows of a batch may stand at different lengths: found out by looking at what the model says.

Rows of different lengths end at one edge of the cache, with unused columns at their left that a mask hides and position
ids skip. Many models count positions by the columns of their cache whatever they are told; under them rows run in step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from ..errors import UncheckableError
from ..exactness.context import Context, Prompt
from ..telemetry.counters import LevelStats
from .carried import keeps_rows_apart
from .even_rows import minds_padding
from .forwarding import Forwarding
from .positions import position_table
from .recurrent import RecurrentRunner
from .release import forward_arguments, inner_model
from .rereading import RereadingRunner, rereads
from .runner import ModelRunner

_LONGEST, _READ_ON, _TURNS = 9, 3, 3
"""Columns of the longer of two rows at most, how many of them the second pass reads (of the shorter row one), and how
often the last bits of the embeddings are moved."""

Runner = TypeVar("Runner", bound=ModelRunner)

_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_untried: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_continued: WeakKeyDictionary[Any, dict[bool, bool]] = WeakKeyDictionary()


def rows_may_part(model: Any) -> bool:
    """Whether a row that is moved within the cache gets the logits that it gets alone; asked once a model.

    A model of the common kind takes positions, which does not say that it obeys them; where it cannot be asked it is
    believed, and any other is taken for one that counts columns: rows that run in step are right under any.
    """
    inner = inner_model(model)
    if inner in _known:
        return _known[inner]
    found = _parts(model)
    if not inner.training:  # dropout says something else every time
        _known[inner] = found
    return found


def serve(runner: Runner, batch: int, *, padded: bool = False) -> Runner:
    """Tell a runner whether its rows have to run in step.

    Models that keep a state are left as they are: whether they read on was tried when their manner was found.

    Args:
        runner: a level's; batch: number of rows to come; padded: whether a mask hides columns of them, be it one row.

    Raises:
        UncheckableError: drafts cannot be checked with this model at all, or not in a batch.
    """
    model = runner.model
    kind = type(inner_model(model)).__name__
    if batch > 1 and not keeps_rows_apart(model):
        raise UncheckableError(
            f"{runner.name} ({kind}) mixes the rows of a batch when it goes on from its state; give it one row at a "
            "time.",
            runner.name,
        )
    if batch > 1 and isinstance(runner, RecurrentRunner) and runner.cache.even and not minds_padding(runner):
        if runner.marks_prompt:
            raise UncheckableError(_no_padding(runner.name, kind), runner.name)
        runner.read_singly()
    if not runner.cuts:
        return runner
    if not reads_on(model, padded=False):
        if (failure := _untried.get(inner_model(model))) is not None:
            raise UncheckableError(
                f"{runner.name} ({kind}) cannot be tried on a few tokens of text alone ({failure}), so that nobody "
                "knows whether drafts can be checked with it; leave it out.",
                runner.name,
            )
        raise UncheckableError(
            f"{runner.name} ({kind}) does not read several tokens after a cache as it reads them in one text, so "
            "drafts cannot be checked with it; leave it out.",
            runner.name,
        )
    alone = batch == 1 and not padded
    if alone or runner.own_rows or (Forwarding(model).keeps_positions() and rows_may_part(model)):
        return runner
    if not reads_on(model, padded=True):
        raise UncheckableError(_no_padding(runner.name, kind), runner.name)
    if batch == 1:
        return runner
    runner.in_step = True
    runner.note = f"{kind} counts positions by its cache's columns: rows run in step, those ahead are read again"
    return runner


def _no_padding(name: str, kind: str) -> str:
    return (
        f"{name} ({kind}) does not mind the padding of a batch when it reads several tokens after a cache; give it one "
        "row at a time."
    )


def _is_ordinary(model: Any) -> bool:
    """Whether a model takes positions and is called by the common method: it is believed where it cannot be asked."""
    return "position_ids" in forward_arguments(model) and Forwarding(model).plain


@torch.no_grad()
def _parts(model: Any) -> bool:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return True
    devices = [device] if device.type == "cuda" else []
    try:
        # A model in training mode draws for its dropout, and nobody's numbers are to move by that.
        with torch.random.fork_rng(devices=devices):
            rows = ids_of_text(model)
            first = len(rows[0]) - _READ_ON
            together = _read(model, first, rows)
            alone = _read(model, first, rows[1:])
            at_once = _read(model, first, rows[1:], at_once=True)
            noise = torch.maximum(_apart(alone, at_once), _noise(model, first, rows[1:], at_once))
    except Exception:
        return _is_ordinary(model)
    return _alike(model, together[1], alone[0], noise)


def reads_on(model: Any, padded: bool) -> bool:
    """Whether several tokens after a cache get the logits that they get in one text; asked once a model.

    Asked only of models that are called in a way of their own (see `forwarding`) or take no position ids: few classes,
    among them those that read one token a pass, or keep something else than the tokens they were given.

    Args:
        model: the level's; padded: whether rows begin with padding.
    """
    inner = inner_model(model)
    if not padded and _is_ordinary(model):
        return True
    found = _continued.setdefault(inner, {})
    if padded not in found:
        found[padded] = _reads_on(model, padded)
    return found[padded]


@torch.no_grad()
def _reads_on(model: Any, padded: bool) -> bool:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return True
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            long = ids_of_text(model)[0]
            rows = [long, long[::-1]]
            first = len(long) - _READ_ON
            if padded and first < 2:  # no room for padding and a token before the second pass
                return True
            padding = min(2, first - 1) if padded else 0
            found, wanted = (_read(model, first, rows, padding=padding, at_once=whole) for whole in (False, True))
            noise = _noise(model, first, rows, wanted, padding=padding)
    except Exception as error:
        _untried[inner_model(model)] = " ".join(str(error.__cause__ or error).split())
        return False
    return _alike(model, found, wanted, noise)


def _noise(model: Any, width: int, rows: list[list[int]], wanted: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """How far the last bits of what a model reads move its logits: rounding to integers inside makes steps of them.

    Args:
        model, width, rows, padding: as for `_read`; wanted: the logits of that, in one pass.
    """
    found = wanted.new_zeros(())
    for turn in range(_TURNS):
        with _last_bits(model, turn):
            moved = _read(model, width, rows, padding=padding, at_once=True)
        found = torch.maximum(found, _apart(moved, wanted))
    return found


@contextmanager
def _last_bits(model: Any, turn: int) -> Iterator[None]:
    """While this runs, the embeddings that this thread's passes look up are off by about their last bits."""
    thread = threading.get_ident()
    dice = torch.Generator().manual_seed(turn)

    def moved(_module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != thread:
            return None
        step = 4 * torch.finfo(output.dtype).eps
        return output * (1 + step * torch.randn(output.shape, generator=dice).to(output))

    handle = model.get_input_embeddings().register_forward_hook(moved)
    try:
        yield
    finally:
        handle.remove()


def _alike(model: Any, one: torch.Tensor, other: torch.Tensor, noise: torch.Tensor) -> bool:
    coarse = 1e-5 if model.dtype in (torch.float32, torch.float64) else 3e-2
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    return bool(_apart(one, other) <= 8 * noise + coarse * _apart(other, torch.zeros_like(other)))


def _apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The largest distance, where there is one: numbers that are none in a level are found when they are drawn from."""
    return (one - other).nan_to_num(0.0, 0.0, 0.0).abs().max()


def _read(model: Any, width: int, rows: list[list[int]], padding: int = 0, *, at_once: bool = False) -> torch.Tensor:
    """Logits `[B, V]` after each row, read in two passes, of which the second moves the shorter rows.

    Args:
        model: whose; width: columns of the prompt, which the first pass reads; rows: what is read.
        padding: columns at the left of the second row that hold no token.
        at_once: in one pass instead, unless the model reads prompts alone.
    """
    stats = LevelStats("probe", 0)
    runner = (RereadingRunner if rereads(model) else ModelRunner)(model, "the probe")
    nothing: list[list[int]] = [[] for _ in rows]
    mask = torch.ones(len(rows), width, dtype=torch.long)
    if padding:
        mask[-1, :padding] = 0
        rows = [*rows[:-1], [0] * padding + rows[-1][padding:]]
    prompt = Prompt(width, mask if padding else None, (mask.cumsum(-1) - 1).clamp(min=0))
    if not at_once:
        runner.run(Context([row[:width] for row in rows], prompt), nothing, stats)
    return runner.run(Context(rows, prompt), nothing, stats).logits[:, 0]


def ids_of_text(model: Any) -> list[list[int]]:
    """Two rows of ids that stand for text, no longer than the model's table of positions if it has one."""
    table = position_table(model)
    longer = _LONGEST if table is None else max(_READ_ON + 1, min(_LONGEST, table.rows))
    shorter = longer - _READ_ON + 1
    config = model.config.get_text_config(decoder=True)
    size = int(model.get_input_embeddings().weight.shape[0])
    special = {
        value
        for owner in (config, model.config)
        for name, value in vars(owner).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    words = [i for i in range(size) if i not in special] if size < 1024 else [*range(256, 1024)]
    words = [i for i in words if i not in special] or [0]
    chosen = [words[(7 * i * i + 5 * i) % len(words)] for i in range(longer + shorter)]
    return [chosen[:longer], chosen[longer:]]
