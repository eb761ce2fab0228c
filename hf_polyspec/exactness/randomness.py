# SPDX-License-Identifier: Apache-2.0
"""Where levels that draw by themselves get their random numbers (token and block verification).

Everything such a level decides by chance goes through one `Randomness` object, so that a test can replace it by one
that walks through every outcome (exact enumeration) and so that a seed set with `torch.manual_seed` reproduces a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Randomness(Protocol):
    """A source of Bernoulli and categorical draws."""

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        """Draw independent coins.

        Args:
            probability: any shape, values in [0, 1].

        Returns:
            Boolean tensor of the same shape, true with the given probability (`u < probability`, strict).
        """
        ...

    def categorical(self, weights: torch.Tensor) -> torch.Tensor:
        """Draw one index a row.

        Args:
            weights: `[B, V]`, non-negative, every row with a positive sum; need not be normalised.

        Returns:
            `[B]` int64.
        """
        ...


class Deciding(Protocol):
    """Takes the decisions that are drawn for: what a verifier keeps, and what it draws."""

    def __call__(self, make: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Let it be decided.

        Args:
            make: decides by what is known in this process, with draws of its own; int64.
            shape: of what it makes, for those who are told instead.
        """
        ...


def decided_here(make: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """By this process."""
    return make()


class TorchRandomness:
    """Draws from torch's global generator, as plain `generate()` does, or from one of its own.

    Args:
        generator: on the device that laws are on; None for the global one.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        # float64 uniforms: a float32 uniform is exactly 0.0 once in 2^24 draws, which would accept a token of
        # probability 1e-9 far too often. MPS has no float64.
        dtype = torch.float32 if probability.device.type == "mps" else torch.float64
        uniform = torch.rand(probability.shape, dtype=dtype, device=probability.device, generator=self.generator)
        return uniform < probability

    def categorical(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(weights, num_samples=1, generator=self.generator).squeeze(1)
