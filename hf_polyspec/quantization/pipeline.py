# SPDX-License-Identifier: Apache-2.0
"""The steps of `polyspec quantize`, each kept on disk as soon as it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from hf_polyspec.quantization.awq import fold_for
from hf_polyspec.quantization.calibrate import choose_layer_bits, input_moments, sensitivity
from hf_polyspec.quantization.continuations import continuations
from hf_polyspec.quantization.libraries import LIBRARIES, quantize_with_library
from hf_polyspec.quantization.mixed import bits_for_agreement
from hf_polyspec.quantization.model import linear_layers, merged_adapters, plan_bits, quantize_model
from hf_polyspec.quantization.modules import output_head
from hf_polyspec.quantization.recovery import Recovery, RecoveryOptions, recover
from hf_polyspec.quantization.store import LayerStore
from hf_polyspec.storage.reading import read_text

LONGEST = 512
"""Tokens of a user's text that are read."""


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        bits: Bits a weight.
        group_size: Inputs that share a scale below 8 bits.
        method: How to round, built in or a library's.
        head_bits: Bits of the layer that makes the logits, None for float.
        high_share: Share of weights that get 8 bits.
        target_agreement: Agreement that as many layers get 8 bits for as it takes, or None.
        calibration: File of texts, None for the model's own.
        calibration_tokens: Length of each of the model's own.
        recovery: How to recover, None for not at all.
    """

    bits: int
    group_size: int
    method: str
    head_bits: int | None
    high_share: float
    target_agreement: float | None
    calibration: Path | None
    calibration_tokens: int
    recovery: RecoveryOptions | None

    @property
    def mixed(self) -> bool:
        """Whether layers may get different widths."""
        return self.high_share > 0 or self.target_agreement is not None

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured before the rounding."""
        return self.method != "rtn" or self.mixed


@dataclass(frozen=True)
class Prompts:
    """Ids `[T]` of prompts.

    Attributes:
        training: To calibrate and to recover on.
        held_out: To measure on.
    """

    training: Sequence[Tensor]
    held_out: Sequence[Tensor]


@dataclass(frozen=True)
class Made:
    """The result.

    Attributes:
        model: The quantised copy.
        recovery: What recovering it came to, None where it was not asked for.
    """

    model: nn.Module
    recovery: Recovery | None


class Pipeline:
    """Makes a quantised copy of a model step by step.

    Args:
        original: The float model; it stays as it is.
        tokenizer: Its tokenizer.
        plan: What is asked for.
        prompts: Built-in ones.
        store: Where finished steps are kept.
        console: Where progress is shown.
    """

    def __init__(
        self, original: Any, tokenizer: Any, plan: Plan, prompts: Prompts, store: LayerStore, console: Console
    ) -> None:
        self.original, self.tokenizer, self.plan = original, tokenizer, plan
        self.prompts, self.store, self.console = prompts, store, console

    def run(self) -> Made:
        """All steps; those of an interrupted run that were finished are not done again."""
        plan = self.plan
        if plan.method in LIBRARIES:
            source: nn.Module = merged_adapters(self.original)
            made = self._by_library(source)
        else:
            source, made = self._built_in()
        return Made(*self._recovered(made, source)) if plan.recovery is not None else Made(made, None)

    def _by_library(self, source: nn.Module) -> nn.Module:
        plan = self.plan
        self.console.print(f"{plan.method} is calibrating; it shows its own progress.")
        return quantize_with_library(
            plan.method, source, self.tokenizer, self._texts(), plan.bits, plan.group_size, head_bits=plan.head_bits
        )

    def _built_in(self) -> tuple[nn.Module, nn.Module]:
        """The float model that was rounded, and the rounded one."""
        plan = self.plan
        model = merged_adapters(self.original)
        texts = self._texts() if plan.needs_text else []
        moments = input_moments(model, texts, diagonal=plan.method == "search") if plan.method != "rtn" else None
        source, method, second = fold_for(plan.method, model, moments, plan.bits, plan.group_size)
        layer_bits = self._layer_bits(source, texts, method, second) if plan.mixed else None
        with self._bar("quantising", len(plan_bits(source, plan.bits, plan.head_bits, layer_bits))) as advance:
            made = quantize_model(
                source, plan.bits, plan.group_size, method=method, head_bits=plan.head_bits, layer_bits=layer_bits,
                calibration=second, store=self.store, progress=lambda _: advance(),
            )  # fmt: skip
        return source, made

    def _texts(self) -> list[Tensor]:
        """Texts `[T]` to calibrate on: the user's, a line each, or the model's own answers to built-in prompts."""
        kept = self.store.recall("texts")
        if kept is not None:
            return [torch.tensor(text) for text in kept]
        if self.plan.calibration is not None:
            texts = user_texts(self.plan.calibration, self.tokenizer)
        else:
            texts = continuations(self.original, self.prompts.training, self.plan.calibration_tokens, seed=0).texts
        self.store.remember("texts", [text.tolist() for text in texts])
        return texts

    def _layer_bits(self, model: nn.Module, texts: list[Tensor], method: str, moments: Any) -> dict[str, int]:
        plan = self.plan
        kept: dict[str, int] | None = self.store.recall("layer_bits")
        if kept is not None:
            return kept
        head = output_head(model)
        body = linear_layers(model, lambda _, module: module is not head)
        body = {name: layer for name, layer in body.items() if name in plan_bits(model, plan.bits, None)}
        with self._bar("measuring how much each layer matters", len(body)) as advance:
            losses = sensitivity(
                model, texts[:2], plan.bits, plan.group_size, lambda name, _: name in body, lambda _: advance()
            )
        if plan.target_agreement is None:
            sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in body.items()}
            chosen = choose_layer_bits(losses, sizes, plan.high_share)
        else:
            chosen = self._reaching(plan.target_agreement, model, texts, losses, method, moments)
        self.store.remember("layer_bits", chosen)
        return chosen

    def _reaching(
        self, wanted: float, model: nn.Module, texts: list[Tensor], losses: dict[str, float], method: str, moments: Any
    ) -> dict[str, int]:
        plan = self.plan
        found = bits_for_agreement(
            model, texts, losses, wanted, low=plan.bits, group_size=plan.group_size, method=method,
            calibration=moments, head_bits=plan.head_bits, progress=self.console.print,
        )  # fmt: skip
        if not found.reached:
            self.console.print(
                f"Agreement {wanted} is not reached even with 8 bits everywhere ({found.agreement:.3f}): all layers "
                "get 8 bits."
            )
        else:
            share = f"{100 * found.share:.0f} % of the weights"
            self.console.print(f"Agreement {found.agreement:.3f} on the calibration text with 8 bits in {share}.")
        return found.layer_bits

    def _recovered(self, made: nn.Module, source: nn.Module) -> tuple[nn.Module, Recovery]:
        plan = self.plan
        assert plan.recovery is not None
        prompts: Sequence[Tensor] = self.prompts.training
        held_out: Sequence[Tensor] | None = self.prompts.held_out
        if plan.calibration is not None:
            prompts, held_out = _openings(user_texts(plan.calibration, self.tokenizer)), None
        with self._bar("recovering", plan.recovery.steps) as advance:
            result = recover(
                made, self.original, prompts, plan.recovery, held_out=held_out, source=source,
                folder=self.store.folder, progress=lambda step, _: advance(step),
            )  # fmt: skip
        self.console.print(result.sentence())
        return result.model, result

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=total)

            def advance(completed: int | None = None) -> None:
                if completed is None:
                    bar.advance(task)
                else:
                    bar.update(task, completed=completed)

            yield advance


def user_texts(file: Path, tokenizer: Any) -> list[Tensor]:
    """Ids `[T]` of a file's lines.

    Raises:
        ValueError: It holds no text.
    """
    lines = [line.strip() for line in read_text(file, "save it as UTF-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} holds no text to calibrate on.")
    return [tokenizer(line, return_tensors="pt")["input_ids"][0][:LONGEST] for line in lines]


def _openings(texts: Sequence[Tensor], longest: int = 64) -> list[Tensor]:
    """The beginnings of texts, which the target then continues itself."""
    return [text[:longest] for text in texts]
