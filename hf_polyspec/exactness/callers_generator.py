# SPDX-License-Identifier: Apache-2.0
"""torch's default generator, as calls that sample from a copy of it share it with everybody else.

A call that samples as plain generate() would draws from a private generator that starts where the default one stands,
and at its end moves the default one to where plain generate() would have left it. Between the two the default one
stands where the call found it, which is nobody's to draw from unnoticed: what others drew then, the call has drawn too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

OTHERS = (
    "torch's default generator was drawn from by something else while this call sampled (a processor, dropout, another "
    "thread): the text follows the target's law, and is not the one that plain generate() writes under this seed"
)
BESIDE = (
    "another sampled call was running on torch's default generator: this one drew from a stream of its own, seeded by "
    "one draw, so its text is not the one that plain generate() writes under this seed"
)

_VALUES_OF_A_SEED = 4
"""The generator is this many values further after a seed was drawn from it, or less."""

_lock = threading.RLock()
_followed: dict[str, CallersGenerator] = {}
"""By device, the call that follows its default generator."""


class CallersGenerator:
    """The default generator of a device during one call.

    The first call on a device follows the generator; while it runs, others take streams of their own, or two threads
    that start from one state would write one text.

    Args:
        device: where the call samples.

    Attributes:
        private: the generator to draw from.
        lost: why the text is not plain generate()'s own, in a sentence; None as long as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.private = torch.Generator(device)
        self.lost: str | None = None
        self._key = str(device)
        self._seeds = 0  # drawn for calls beside this one
        with _lock:
            self._expected = read_state(device)
            ahead = _followed.get(self._key)
            if ahead is None:
                self.private.set_state(self._expected)
                _followed[self._key] = self
            else:
                self.private.manual_seed(drawn_seed(device))
                self.lost = BESIDE

    @property
    def follows(self) -> bool:
        """Whether this call is the one that moves the default generator on."""
        return _followed.get(self._key) is self

    def was_disturbed(self) -> bool:
        """Whether somebody else has drawn from the default generator; True once, when it is first seen."""
        if self.lost is not None:
            return False
        with _lock:
            if torch.equal(read_state(self.device), self._expected):
                return False
            self.lost = OTHERS
            return True

    def finish(self, state: torch.Tensor, values: int) -> None:
        """The call is over; the default generator goes where plain generate() would have left it, never back.

        Args:
            state: after the call's draws; values: how many were drawn.
        """
        with _lock:
            self.was_disturbed()
            if not self.follows:
                return
            del _followed[self._key]
            if self._seeds and values < _VALUES_OF_A_SEED * self._seeds:
                self.lost = self.lost or OTHERS  # the seeds of the calls beside this one would be drawn again
            if self.lost is None and values:
                write_state(self.device, state)


def drawn_seed(device: torch.device) -> int:
    """One draw from a device's default generator, to seed a stream with; the call that follows it is not disturbed."""
    with _lock:
        ahead = _followed.get(str(device))
        undisturbed = ahead is not None and torch.equal(read_state(device), ahead._expected)
        seed = int(torch.empty((), dtype=torch.int64, device=device).random_())
        if ahead is not None and undisturbed:
            ahead._expected = read_state(device)
            ahead._seeds += 1
        return seed


@contextmanager
def lent_state(device: torch.device, state: torch.Tensor) -> Iterator[None]:
    """The default generator stands elsewhere while this runs, and then again where it stood; others wait."""
    with _lock:
        before = read_state(device)
        write_state(device, state)
        try:
            yield
        finally:
            write_state(device, before)


def read_state(device: torch.device) -> torch.Tensor:
    """Where the default generator of a device stands."""
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    state: torch.Tensor = module.get_rng_state(*_place(module.get_rng_state, device))
    return state


def write_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
        return
    module = torch.get_device_module(device)
    module.set_rng_state(state, *_place(module.set_rng_state, device))


def _place(function: Any, device: torch.device) -> tuple[torch.device, ...]:
    """The device as an argument, where a kind of device has more than one."""
    return (device,) if "device" in inspect.signature(function).parameters else ()
