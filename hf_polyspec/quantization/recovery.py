# SPDX-License-Identifier: Apache-2.0
"""Winning back what rounding cost: adapters distilled towards the target, merged and rounded again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_polyspec.errors import DamagedFileError
from hf_polyspec.quantization.continuations import Texts, continuations
from hf_polyspec.quantization.measure import Comparison, compare
from hf_polyspec.quantization.model import merged_adapters
from hf_polyspec.quantization.straight_through import Student
from hf_polyspec.storage.atomic import write_state
from hf_polyspec.storage.reading import read_state

STATE = "recovery.pt"


@dataclass(frozen=True)
class RecoveryOptions:
    """How long and how to train.

    Attributes:
        steps: Optimiser steps.
        rank: Of the LoRA adapters.
        batch: Texts a step.
        learning_rate: Highest rate; it rises over the first twentieth of the steps and falls along a cosine.
        new_tokens: Tokens the target continues each prompt by; 0 takes the prompts as whole texts.
        samples: Continuations of each prompt.
        seed: Of the continuations, the adapters and the order of the texts.
        save_every: Steps between two savings, where a folder is given.

    Raises:
        ValueError: A number out of range.
    """

    steps: int = 100
    rank: int = 16
    batch: int = 4
    learning_rate: float = 1e-3
    new_tokens: int = 96
    samples: int = 4
    seed: int = 0
    save_every: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "rank", "batch", "samples", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.new_tokens < 0 or not self.learning_rate > 0:
            raise ValueError("new_tokens must be 0 or more, and learning_rate above 0.")


@dataclass(frozen=True)
class Recovery:
    """What came of it.

    Attributes:
        model: The better one of the middle as it was and the recovered one.
        before: The middle against the target on held-out text.
        after: The recovered middle, merged and rounded, on the same text.
        steps: Steps trained.
        losses: Mean KL divergence of each step taken in this run.
    """

    model: nn.Module
    before: Comparison
    after: Comparison
    steps: int
    losses: list[float]

    @property
    def gain(self) -> float:
        """Agreement won, the mean of `sum(min(p, q))` after less before; negative where the middle was kept."""
        return self.after.agreement - self.before.agreement

    @property
    def improved(self) -> bool:
        """Whether `model` is the recovered one."""
        return self.gain > 0

    def sentence(self) -> str:
        """The result in words."""
        change = f"agreement {self.before.agreement:.3f} before, {self.after.agreement:.3f} after {self.steps} steps"
        where = f"on {self.before.tokens} held-out tokens"
        if self.improved:
            return f"Recovery: {change}, {where}."
        return f"Recovery won nothing ({change}, {where}): the middle is kept as it was."


def recover(
    middle: nn.Module,
    target: nn.Module,
    prompts: Sequence[Tensor],
    options: RecoveryOptions | None = None,
    *,
    held_out: Sequence[Tensor] | None = None,
    source: nn.Module | None = None,
    folder: str | Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Recovery:
    """Distil a quantised middle towards its target, so that more of what it proposes is accepted.

    LoRA adapters (PEFT) on the quantised layers learn to lower `KL(p || q)` on text the target wrote itself. They are
    added to the weights before these are rounded, and gradients pass the rounding straight through (Bengio et al.,
    arXiv 1308.3432), so the merged and rounded model is the one that was trained and runs at the same speed.

    Args:
        middle: From `quantize_model` or `load_quantized`; it stays as it is.
        target: The model whose distribution counts; a PEFT model keeps its adapters.
        prompts: Ids `[T]` that the target continues.
        options: How long and how to train.
        held_out: Prompts to measure on; by default every fourth of `prompts`, which is then not trained on.
        source: The float model the middle was rounded from, if it is not `target` (adapters merged).
        folder: Where the state is kept; a run that was killed goes on from there. It is removed at the end.
        progress: Called with the number of steps done and the loss of the last.

    Returns:
        The better model, with both measurements.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: Too few prompts, no quantised layer, or a folder of a run with other settings.
    """
    need_peft()
    chosen = options or RecoveryOptions()
    training, testing = _split(list(prompts), held_out, chosen)
    origin = merged_adapters(target) if source is None else source
    with torch.random.fork_rng():
        torch.manual_seed(chosen.seed)
        student = Student(middle, origin, chosen.rank)
    store = None if folder is None else _Store(Path(folder), chosen, training)
    state = None if store is None else store.read()
    texts = _written(target, training, chosen, chosen.seed) if state is None else Texts(state["texts"], state["starts"])
    held = _written(target, testing, chosen, chosen.seed + 1)
    before = compare(target, middle, held.texts, held.starts)
    losses = _train(student, target, texts, chosen, store, state, progress)
    recovered = student.merged()
    after = compare(target, recovered, held.texts, held.starts)
    if store is not None:
        store.remove()
    better = recovered if after.agreement > before.agreement else middle
    return Recovery(better, before, after, chosen.steps, losses)


def need_peft() -> None:
    """Say what to install where PEFT is missing.

    Raises:
        ImportError: It is.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError('Recovering a middle needs the package peft: pip install "hf_polyspec[peft]".') from error


def _split(
    prompts: list[Tensor], held_out: Sequence[Tensor] | None, options: RecoveryOptions
) -> tuple[list[Tensor], list[Tensor]]:
    if held_out is None:
        testing, training = prompts[::4], [text for i, text in enumerate(prompts) if i % 4]
    else:
        testing, training = list(held_out), prompts
    if not training or not testing:
        raise ValueError("Recovery needs prompts to train on and others to measure on: give at least two.")
    shortest = min(len(text) for text in (*training, *testing))
    if shortest < (1 if options.new_tokens else 2):
        raise ValueError("Recovery needs prompts of at least one token, and whole texts of at least two.")
    return training, testing


def _written(target: Any, prompts: Sequence[Tensor], options: RecoveryOptions, seed: int) -> Texts:
    """The target's continuations; for whole texts, these."""
    if not options.new_tokens:
        return Texts([text.cpu() for text in prompts], [1] * len(prompts))
    texts, starts = [], []
    for sample in range(options.samples):
        found = continuations(target, prompts, options.new_tokens, seed=seed * 1000 + sample)
        texts += [text.cpu() for text in found.texts]
        starts += found.starts
    if not texts:
        raise ValueError("The target ended every text at once: there is nothing to train on.")
    return Texts(texts, starts)


def _train(
    student: Student,
    target: Any,
    texts: Texts,
    options: RecoveryOptions,
    store: _Store | None,
    state: dict[str, Any] | None,
    progress: Callable[[int, float], None] | None,
) -> list[float]:
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
    done = 0
    if state is not None:
        student.load(state["adapters"])
        optimizer.load_state_dict(state["optimizer"])
        done = int(state["step"])
    losses: list[float] = []
    for step in range(done, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _rate(step, options.steps)
        loss = _divergence(student.model, target, texts, _chosen(len(texts.texts), step, options))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if store is not None and ((step + 1) % options.save_every == 0 or step + 1 == options.steps):
            store.write(step + 1, student, optimizer, texts)
        if progress is not None:
            progress(step + 1, losses[-1])
    return losses


def _rate(step: int, steps: int) -> float:
    """Share of the highest learning rate at a step."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _chosen(count: int, step: int, options: RecoveryOptions) -> list[int]:
    """The texts of a step: every text once before any comes again, a function of the step alone."""
    found: list[int] = []
    for place in range(step * options.batch, (step + 1) * options.batch):
        epoch, index = divmod(place, count)
        generator = torch.Generator().manual_seed(options.seed * 100_003 + epoch)
        found.append(int(torch.randperm(count, generator=generator)[index]))
    return sorted(set(found))


def _divergence(student: Any, target: Any, texts: Texts, chosen: Sequence[int]) -> Tensor:
    """Mean `KL(p || q)` over the tokens that continue the prompts."""
    rows = [texts.texts[i] for i in chosen]
    ids = pad_sequence(rows, batch_first=True)  # [B, T], padded on the right, where causal attention never looks
    mask = torch.zeros_like(ids)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for b, (row, i) in enumerate(zip(rows, chosen, strict=True)):
        mask[b, : len(row)] = 1
        counted[b, texts.starts[i] - 1 : len(row) - 1] = True
    with torch.no_grad():
        p = _log_law(target, ids, mask, counted)  # [M, V]
    q = _log_law(student, ids, mask, counted)
    return (p.exp() * (p - q)).sum(-1).mean()


def _log_law(model: Any, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return torch.log_softmax(logits[counted.to(logits.device)].float(), -1).cpu()


class _Store:
    """The state of a run on disk, appearing whole or not at all.

    Args:
        folder: Made if need be.
        options: Of the run.
        prompts: Trained on.

    Raises:
        ValueError: The folder holds the state of a run with other settings.
    """

    def __init__(self, folder: Path, options: RecoveryOptions, prompts: Sequence[Tensor]) -> None:
        self._path = folder / STATE
        wanted = {name: value for name, value in asdict(options).items() if name != "save_every"}
        self._settings = json.dumps({**wanted, "prompts": [prompt.tolist() for prompt in prompts]})
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> dict[str, Any] | None:
        """The last state saved, None if there is none."""
        if not self._path.is_file():
            return None
        remedy = "delete it, and the same command recovers from the beginning"
        state: Any = read_state(self._path, remedy)
        if not isinstance(state, dict) or not {"settings", "step", "adapters", "optimizer", "texts"} <= state.keys():
            raise DamagedFileError(self._path, "it is no state of a recovery", remedy)
        if state["settings"] != self._settings:
            raise ValueError(
                f"{self._path} is the state of an interrupted recovery with other settings or prompts: "
                "finish that run with its own, or delete the file."
            )
        return state

    def write(self, step: int, student: Student, optimizer: torch.optim.Optimizer, texts: Texts) -> None:
        """Keep everything a run needs to go on after this step."""
        state = {
            "settings": self._settings,
            "step": step,
            "adapters": student.state(),
            "optimizer": optimizer.state_dict(),
            "texts": [text.clone() for text in texts.texts],
            "starts": texts.starts,
        }
        write_state(self._path, state)

    def remove(self) -> None:
        """Delete the state: the run is complete."""
        self._path.unlink(missing_ok=True)
