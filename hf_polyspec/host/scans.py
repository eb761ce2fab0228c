# SPDX-License-Identifier: Apache-2.0
"""The scans over columns that a pass runs: kept as short as the pass is, and heard with what they were given.

A layer with a recurrent state computes what its scan reads (queries, keys, decays, time steps), and hands that to a
function of its file together with the state to go on from. Those functions are known by the name of that argument,
whatever they compute. While a runner is in a pass they are called through one that stands in their place, for this
thread alone. Scans in plain torch work in chunks of 64 to 256 columns and fill up what is missing, which for a draft of
five costs many times what all the rest of the pass does; they are asked for chunks of as many columns as there are.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .named_code import state_writers
from .release import inner_model

_GOES_ON_FROM = ("initial_state", "initial_states")
"""What scans call the state to go on from. Those for one column alone change it in place, under other names."""
_CHUNK = "chunk_size"


@dataclass(eq=False)
class Scan:
    """One call of a scan.

    Attributes:
        function: what was called; given: its arguments by name; initial: which of them is the state to go on from.
        returned: what it returned, until it is known whose state that is.
        layer, index: whose: counted as the cache does, and among the states of the layer.
        place: of the new state among what was returned.
    """

    function: Callable[..., Any]
    given: dict[str, Any]
    initial: str
    returned: tuple[Any, ...] = ()
    layer: int = -1
    index: int = 0
    place: int = 0

    @property
    def columns(self) -> int:
        """How many the scan ran over."""
        return next(int(one.shape[1]) for one in self.given.values() if by_row(one))


@dataclass
class Heard:
    """What the layers with a state did in one pass.

    Attributes:
        scans: those that gave a layer its state.
        windows: layer, index among its windows, and the columns `[B, C, F]` that a window moved over.
        open: scans of which it is not known yet whose they are.
    """

    scans: list[Scan] = field(default_factory=list)
    windows: list[tuple[int, int, torch.Tensor]] = field(default_factory=list)
    open: list[Scan] = field(default_factory=list)

    def wrote(self, layer: int, index: int, before: torch.Tensor | None, after: torch.Tensor) -> None:
        """A layer is about to write a state: by which scan it came to be."""
        for scan in self.open:
            places = [place for place, one in enumerate(scan.returned) if _is(one, after)]
            if places and _is(scan.given[scan.initial], before):
                scan.layer, scan.index, scan.place, scan.returned = layer, index, places[0], ()
                scan.given[scan.initial] = None  # will be written over
                self.scans.append(scan)
                self.open.remove(scan)
                return

    def covers(self, layers: list[Any]) -> bool:
        """Whether every state and every window of a cache's layers was heard of, once."""
        scanned = [(one.layer, one.index) for one in self.scans]
        moved = [(layer, index) for layer, index, _ in self.windows]
        return sorted(scanned) == _held(layers, "recurrent_states") and sorted(moved) == _held(layers, "conv_states")

    def of_rows(self, rows: Sequence[int]) -> Heard:
        """The same of some rows, in tensors of their own."""
        picked = [
            replace(scan, given={name: _picked(one, rows) if by_row(one) else one for name, one in scan.given.items()})
            for scan in self.scans
        ]
        return Heard(picked, [(layer, index, _picked(columns, rows)) for layer, index, columns in self.windows])

    @functools.cached_property
    def bytes(self) -> int:
        """Memory that would be free without this."""
        given = [one for scan in self.scans for one in scan.given.values()]
        tensors = [one for one in [*given, *(one for _, _, one in self.windows)] if isinstance(one, torch.Tensor)]
        found = {one.untyped_storage().data_ptr(): one for one in tensors if not isinstance(one, torch.nn.Parameter)}
        return sum(one.untyped_storage().nbytes() for one in found.values())


def by_row(value: Any) -> bool:
    """Whether an argument of a scan has an entry a row; those of all rows have a dimension or two."""
    return isinstance(value, torch.Tensor) and value.dim() > 2


def _picked(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return tensor[torch.tensor(rows, device=tensor.device)]


def _is(one: Any, other: Any) -> bool:
    """Whether two are one tensor."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _held(layers: list[Any], name: str) -> list[tuple[int, int]]:
    return [
        (place, index)
        for place, layer in enumerate(layers)
        for index, one in getattr(layer, name, {}).items()
        if one is not None
    ]


Told = Callable[[Scan], None] | None


class _Ear:
    """Stands in the place of a function of a file while any thread is in a pass of it."""

    def __init__(self, beside: dict[str, Any], name: str, initial: str) -> None:
        self._beside, self._name, self._initial = beside, name, initial
        self._lock, self._told = threading.Lock(), dict[int, Told]()
        self._function: Callable[..., Any]

    @contextmanager
    def placed(self, told: Told) -> Iterator[None]:
        """While this runs, calls of this thread are short, and told of."""
        thread = threading.get_ident()
        with self._lock:
            if not self._told:
                self._function = self._beside[self._name]
                self._beside[self._name] = self._stand_in()
            self._told[thread] = told
        try:
            yield
        finally:
            with self._lock:
                del self._told[thread]
                if not self._told:
                    self._beside[self._name] = self._function

    def _stand_in(self) -> Callable[..., Any]:
        function = self._function

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            thread = threading.get_ident()
            scan = Scan(function, _by_name(function, args, kwargs), self._initial)
            if thread not in self._told or not isinstance(scan.given.get(self._initial), torch.Tensor):
                return function(*args, **kwargs)
            fit(scan)
            returned = function(**scan.given)
            told = self._told[thread]
            if told is not None and isinstance(returned, tuple):
                scan.returned = returned
                told(scan)
            return returned

        return called


def _by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(function).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def fit(scan: Scan) -> None:
    """Ask for chunks no longer than what is scanned, of code that runs on a CPU: kernels of a GPU have their sizes."""
    named = inspect.signature(scan.function).parameters
    size = scan.given.get(_CHUNK, named[_CHUNK].default if _CHUNK in named else None)
    if isinstance(size, int) and scan.given[scan.initial].device.type == "cpu":
        scan.given[_CHUNK] = min(size, scan.columns)


_ears: dict[tuple[int, str], _Ear] = {}  # by the names of a file, which stay as long as the process does


class Ears:
    """What stands between a model's layers and their scans.

    Args:
        model: the level's.
    """

    def __init__(self, model: Any) -> None:
        self._ears: list[_Ear] = []
        for kind in {type(part) for part in state_writers(inner_model(model))}:
            function = inspect.unwrap(kind.forward)
            beside = getattr(function, "__globals__", {})
            for name in getattr(getattr(function, "__code__", None), "co_names", ()):
                initial = _initial(beside.get(name))
                if initial is not None:
                    self._ears.append(_ears.setdefault((id(beside), name), _Ear(beside, name, initial)))

    @contextmanager
    def hearing(self, told: Told) -> Iterator[None]:
        """While this runs, scans in passes of this thread are short, and told of if anybody wants to know."""
        with ExitStack() as stack:
            for ear in dict.fromkeys(self._ears):
                stack.enter_context(ear.placed(told))
            yield


def _initial(function: Any) -> str | None:
    """Which argument of a function is a state to go on from, None for what is no scan."""
    if not callable(function) or isinstance(function, type):
        return None
    try:
        named = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in _GOES_ON_FROM if name in named), None)
