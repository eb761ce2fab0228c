# SPDX-License-Identifier: Apache-2.0
"""Where the time of a chain goes, by level and by kind of work, from one answer under torch's profiler."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..levels.names import name_of
from .cast import Ask, Cast
from .methods import Method

KINDS = ("matrix products", "attention", "small operations", "Python")
TOKENS = 32
OUTSIDE = "between the levels"
_MARK = "polyspec level "
_LOG_LEVEL = "KINETO_LOG_LEVEL"
_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")
_PRODUCTS = ("mm", "matmul", "linear", "int4pack", "int8pack", "gemm", "onednn", "mkldnn", "fbgemm", "quantized")


def kind_of(name: str) -> str:
    """The kind of work of an operation, by its name in the profiler."""
    if any(word in name for word in _ATTENTION):
        return "attention"
    if any(word in name for word in _PRODUCTS):
        return "matrix products"
    return "small operations"


def measure(cast: Cast, method: Method, prompts: Sequence[Sequence[int]], ask: Ask) -> dict[str, dict[str, float]]:
    """Answer once under the profiler.

    Args:
        cast: the models; method: a chain of them.
        prompts: ids of each row; ask: what is asked for.

    Returns:
        By level (and `OUTSIDE`) and kind, the share of the wall time under the profiler, 0 to 1. The profiler makes
        small operations and Python look longer than they are.
    """
    modules = [cast.packed, *(one for one in cast.members(method) if isinstance(one, torch.nn.Module))]
    names = [_name(place, one) for place, one in enumerate(modules)]
    on_cuda = cast.target.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with _marked(modules, names), _silent(), profile(activities=activities) as found:
        started = time.perf_counter()
        cast.answer(method, prompts, ask)
        wall = time.perf_counter() - started
    return shares(found.events() or (), wall, on_cuda)


def shares(events: Iterable[Any], wall: float, on_cuda: bool) -> dict[str, dict[str, float]]:
    """Events of the profiler as shares of the wall time; see `measure`.

    Args:
        events: of the profiler; wall: seconds; on_cuda: whether operations take the accelerator's time.
    """
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for event in events:
        if event.device_type.name != "CPU":
            continue  # a kernel's own entry: the operation that started it carries its time, and its level
        marked = event.name.startswith(_MARK)
        own = float(event.self_device_time_total if on_cuda and not marked else event.self_cpu_time_total) / 1e6
        seconds[_level(event)]["Python" if marked else kind_of(event.name)] += own
    counted = sum(sum(kinds.values()) for kinds in seconds.values())
    seconds[OUTSIDE]["Python"] += max(0.0, wall - counted)
    wall = max(wall, counted)
    return {level: {kind: value / wall for kind, value in kinds.items()} for level, kinds in sorted(seconds.items())}


def _name(place: int, model: Any) -> str:
    return f"{place} {name_of(model) or type(model).__name__}"


def _level(event: Any) -> str:
    while event is not None:
        if event.name.startswith(_MARK):
            return str(event.name).removeprefix(_MARK)
        event = event.cpu_parent
    return OUTSIDE


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Kineto, the library under the profiler, from writing its starts and stops to stderr.

    It reads how much to say when the process profiles for the first time; these lines count as graver than errors, so
    the level is one above all. Whoever sets it is heard.
    """
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = "6"
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]


@contextmanager
def _marked(modules: Sequence[Any], names: Sequence[str]) -> Iterator[None]:
    """Let each module's forward passes appear in the profile under its name."""
    open_marks: list[Any] = []

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            mark: Any = record_function(_MARK + name)
            mark.__enter__()
            open_marks.append(mark)

        return hook

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for module, name in zip(modules, names, strict=True):
            stack.callback(module.register_forward_pre_hook(enter(name), prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
