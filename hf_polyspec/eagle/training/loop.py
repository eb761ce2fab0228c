# SPDX-License-Identifier: Apache-2.0
"""The training loop: accelerate, exact resume, a curve on disk and acceptance on held-out texts."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_polyspec.eagle.features import target_parts
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.checkpoints import Checkpoints, RunState
from hf_polyspec.eagle.training.config import TrainingConfig
from hf_polyspec.eagle.training.curve import append_row, forget_after, put_validation, tracker_values
from hf_polyspec.eagle.training.dataset import (
    Batch,
    Corpus,
    TargetReader,
    Text,
    collate,
    place_of,
    plan_batches,
    spread,
    text_number,
)
from hf_polyspec.eagle.training.feature_cache import FeatureCache
from hf_polyspec.eagle.training.kept_states import identity, read_seen
from hf_polyspec.eagle.training.lesson import LearningHead, build_head, build_softmax_ids
from hf_polyspec.eagle.training.losses import LossSums, TargetView, Teacher, noisy
from hf_polyspec.eagle.training.optimizers import build_optimizers
from hf_polyspec.eagle.training.prompts import sample_random
from hf_polyspec.eagle.training.shards import GREEDY
from hf_polyspec.eagle.training.stopping import StopRequest
from hf_polyspec.eagle.training.validation import KIND_NAMES, Acceptance, count_acceptance


@dataclass(frozen=True)
class Progress:
    """What is shown while training.

    Args:
        step: optimizer steps done, of `total_steps`.
        total_steps: of the whole run.
        epoch: the epoch under way, from 0.
        tokens: training tokens used, of `total_tokens`.
        total_tokens: of the whole run.
        loss: of the last step, a row.
        tokens_per_second: since this run was started or resumed.
    """

    step: int
    total_steps: int
    epoch: int
    tokens: int
    total_tokens: int
    loss: float
    tokens_per_second: float


class Trainer:
    """Trains one head; a second start with the same config goes on where the last checkpoint stands.

    Args:
        config: the run.
        target: the frozen model, on the accelerator's device.
        reader_model: whose features are read; the target or a quantised copy of it.
        tokenizer: the target's.
        corpus: the texts.
        accelerator: processes, precision, trackers.

    Raises:
        ValueError: the head does not fit the target, or there is no text to measure acceptance on.
    """

    def __init__(
        self,
        config: TrainingConfig,
        target: PreTrainedModel,
        reader_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.plan = config, config.optimization
        self.corpus, self.accelerator = corpus, accelerator
        held_out = [text for text in corpus.validation if place_of(text) in config.validation_places]
        if not held_out:
            raise ValueError("no text of the folders in validate_on is held out; raise validation_fraction")
        self.held_out = spread(held_out, self.plan.validation_texts)
        target.requires_grad_(False)
        torch.manual_seed(self.plan.seed)
        parts = target_parts(target)
        head = build_head(config, target, tokenizer, corpus)
        self.source = self._build_source(head, reader_model)
        module = LearningHead(head, Teacher(head, parts), config)
        self.module, *self.optimizers = accelerator.prepare(module, *build_optimizers(module, self.plan))
        self.head = head
        self.softmax_ids = build_softmax_ids(config, corpus, parts)
        self.state = RunState(corpus=_fingerprint(corpus.train))
        accelerator.register_for_checkpointing(self.state)
        self.checkpoints = Checkpoints(config.folder / "checkpoints", accelerator, self.plan.keep_checkpoints)
        self.steps_per_epoch = [len(self._groups(epoch)) for epoch in range(self.plan.epochs)]
        self.total_tokens = self.plan.epochs * sum(len(text) for text in corpus.train)
        self.session = (time.time(), 0)

    def run(
        self, deadline: float | None = None, report: Callable[[Progress], None] | None = None
    ) -> dict[str, dict[str, object]] | None:
        """Trains until all epochs are done.

        Args:
            deadline: seconds since the epoch at which to stop, or None.
            report: called after every optimizer step.

        Returns:
            Acceptance by kind of text after the last step, or None when stopped before the end. Either way there is
            a checkpoint of the last step.

        Raises:
            ValueError: the texts are not those the run began with.
        """
        self._resume()
        self.session = (time.time(), self.state.tokens)
        spent = self.state.seconds
        with StopRequest(deadline) as stop:
            for group in self._remaining():
                self._advance(group, spent, report)
                if self.state.step % self.plan.checkpoint_every == 0:
                    self.checkpoints.save(self.state.step)
                if self.state.step % self.plan.validate_every == 0 and not self.finished:
                    self.validate()
                if self._anyone(stop.asked):
                    self.checkpoints.save(self.state.step)
                    if not self.finished:
                        return None
        self.checkpoints.save(self.state.step)
        return self.validate()

    def state_of_play(self) -> str:
        """Where the run stands, in words."""
        newest = self.checkpoints.newest()
        return "from the start" if newest is None else f"going on from {newest.name}"

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.state.step >= sum(self.steps_per_epoch)

    def _build_source(self, head: EagleHead, reader_model: PreTrainedModel) -> TargetReader | FeatureCache:
        parts = target_parts(reader_model)
        reader = TargetReader(reader_model, head.config, parts)
        if not self.plan.feature_cache:
            return reader
        texts = [*self.corpus.train, *self.corpus.validation]
        folder = self.config.folder / "features"
        name = f"{self.config.target}/{self.config.revision}/{self.config.reader}/{reader_model.dtype}"

        def opened(owner: bool) -> FeatureCache:
            return FeatureCache(folder, reader, texts, head.config.feature_size, parts.hidden_size, name, owner)

        if self.accelerator.is_main_process:
            cache = opened(True)
            self._adopt_states(cache, reader.layers)
        self.accelerator.wait_for_everyone()
        return cache if self.accelerator.is_main_process else opened(False)

    def _adopt_states(self, cache: FeatureCache, layers: list[int]) -> None:
        """What the writers of the texts kept need not be read again; prompts that are learned need more than that."""
        if self.plan.learn_prompts:
            return
        whose = identity(self.config.target, self.config.revision, self.config.reader, layers)
        for place, folder in enumerate(self.config.texts_folders):
            for number, seen in read_seen(folder, whose):
                cache.adopt(text_number(place, number), seen)

    def _groups(self, epoch: int) -> list[list[list[int]]]:
        """The optimizer steps of an epoch, each a list of batches over all processes."""
        batches = plan_batches(self.corpus.train, self.plan.batch_tokens, self.plan.seed, epoch)
        size = self.plan.accumulation * self.accelerator.num_processes
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def _remaining(self) -> Iterator[list[list[int]]]:
        for epoch in range(self.state.epoch, self.plan.epochs):
            batches = [batch for group in self._groups(epoch) for batch in group]
            size = self.plan.accumulation * self.accelerator.num_processes
            while self.state.position < len(batches):
                yield batches[self.state.position : self.state.position + size]
            self.state.epoch, self.state.position = epoch + 1, 0

    def _resume(self) -> None:
        expected = self.state.corpus
        if self.checkpoints.load_newest() is None:
            self._forget_after(0)
            return
        if self.state.corpus != expected:
            raise ValueError(
                "the texts changed since this run began; keep them as they were, or start a new run that goes on from "
                "this head (init_from)"
            )
        self._forget_after(self.state.step)

    def _forget_after(self, step: int) -> None:
        if self.accelerator.is_main_process:
            forget_after(self.config.folder, step)

    def _advance(self, group: list[list[int]], spent: float, report: Callable[[Progress], None] | None) -> None:
        rate = self.plan.rate(self.state.step, sum(self.steps_per_epoch))
        for optimizer in self.optimizers:
            for entry in optimizer.param_groups:
                entry["lr"] = rate
        sums, norm = self._step(group)
        self.state.step += 1
        self.state.position += len(group)
        self.state.tokens += sum(len(self.corpus.train[i]) for batch in group for i in batch)
        began, before = self.session
        elapsed = time.time() - began
        self.state.seconds = spent + elapsed
        pace = (self.state.tokens - before) / max(elapsed, 1e-9)
        total = sum(self.steps_per_epoch)
        loss = float(sums.loss) / max(float(sums.rows), 1.0)
        if self.state.step % self.plan.log_every == 0 or self.state.step == total:
            self._log(loss, sums, rate, norm, pace)
        if report is not None:
            state = self.state
            report(Progress(state.step, total, state.epoch, state.tokens, self.total_tokens, loss, pace))

    def _step(self, group: list[list[int]]) -> tuple[LossSums, float]:
        """One optimizer step over the batches of all processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = sum(self._rows(i) for batch in group for i in batch)
        turns = -(-len(group) // world)
        totals: LossSums | None = None
        self.module.train()
        for turn in range(turns):
            index = turn * world + rank
            # a process without a batch of its own joins in with one that counts for nothing
            share = 1.0 if index < len(group) else 0.0
            texts = [self.corpus.train[i] for i in group[index if share else 0]]
            batch, view = self._load(texts, turn)
            last = turn == turns - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                first = self._first(batch)
                among, kept = self._among(batch, view, turn), self._kept(batch, turn, first)
                sums: LossSums = self.module(batch.tokens, batch.answer, view, among, kept, first)
                # processes average their gradients, hence the factor
                self.accelerator.backward(sums.loss * (share * world / max(rows, 1)))
            totals = _added(totals, sums, share)
        norm = self._clip()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if totals is None:
            raise RuntimeError("an optimizer step had no batch")
        return self._reduced(totals), norm

    def _load(self, texts: list[Text], turn: int) -> tuple[Batch, TargetView]:
        batch = collate(texts, self.plan.learn_prompts).to(self.accelerator.device)
        view = self.source.read(batch)
        if self.plan.greedy_temperature != 1.0:
            wanted = [self.plan.greedy_temperature if text.kind == GREEDY else 1.0 for text in texts]
            view = replace(view, temperatures=torch.tensor(wanted, device=batch.tokens.device))
        if self.config.head.algorithm == "eagle1" and self.module.training:
            seed = sample_random(self.plan.seed, self._number(turn), "noise").getrandbits(63)
            generator = torch.Generator().manual_seed(seed)
            view = replace(view, features=noisy(view.features, self.plan.feature_noise, generator))
        return batch, view

    def _among(self, batch: Batch, view: TargetView, turn: int) -> torch.Tensor | None:
        """The ids that head and target are compared on, None for all of the head's."""
        chosen = self.softmax_ids
        return None if chosen is None else chosen.choose(batch.tokens, view.best, self._number(turn))

    def _first(self, batch: Batch) -> int:
        """The first row that learns: its last step guesses the first token of the answer that begins first."""
        prompts = [text.prompt_length for text in batch.texts]
        return 0 if self.plan.learn_prompts else max(0, min(prompts) - 1 - self.plan.steps)

    def _kept(self, batch: Batch, turn: int, first: int) -> torch.Tensor | None:
        """The rows from `first` on that draft on after the first step, None for all."""
        stride, rows = self.plan.row_stride, batch.tokens.shape[1] - 1
        if stride == 1:
            return None
        # beginning anywhere, so that no place in a text is passed over for good
        begin = sample_random(self.plan.seed, self._number(turn), "rows").randrange(min(stride, rows - first))
        return torch.arange(first + begin, rows, stride, device=batch.tokens.device)

    def _number(self, turn: int) -> int:
        """Of a batch of this process in the run, so that a resumed run draws the same random numbers."""
        number: int = (self.state.step * 4096 + turn) * 4096 + self.accelerator.process_index
        return number

    def _rows(self, index: int) -> int:
        """Tokens of a text's answer that step 0 can guess; see `answer_rows`."""
        text = self.corpus.train[index]
        return len(text) - max(2, 0 if self.plan.learn_prompts else text.prompt_length)

    def _clip(self) -> float:
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        if self.config.head.algorithm == "eagle1":
            self.accelerator.clip_grad_value_(weights, self.plan.clip)
            gradients = [weight.grad.norm() for weight in weights if weight.grad is not None]
            return float(torch.stack(gradients).norm())
        return float(self.accelerator.clip_grad_norm_(weights, self.plan.clip))

    def _reduced(self, sums: LossSums) -> LossSums:
        if self.accelerator.num_processes == 1:
            return sums
        parts = (sums.loss, sums.rows, sums.per_step, sums.counted)
        return LossSums(*(self.accelerator.reduce(part, "sum") for part in parts))

    def _anyone(self, asked: bool) -> bool:
        """Whether any process was asked to stop, so that all stop together."""
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(int(asked), device=self.accelerator.device)
        return int(self.accelerator.reduce(flag, "sum")) > 0

    def _log(self, loss: float, sums: LossSums, rate: float, norm: float, pace: float) -> None:
        steps = (sums.per_step / sums.counted.clamp(min=1)).tolist()
        row: dict[str, float] = {
            "step": self.state.step,
            "epoch": self.state.epoch,
            "tokens": self.state.tokens,
            "loss": round(loss, 5),
            **{f"{self.plan.objective}_{index}": round(value, 5) for index, value in enumerate(steps)},
            "learning_rate": rate,
            "gradient_norm": round(norm, 5),
            "tokens_per_second": round(pace, 1),
        }
        if self.accelerator.is_main_process:
            append_row(self.config.folder / "curve.csv", row)
        self.accelerator.log(row, step=self.state.step)

    def validate(self) -> dict[str, dict[str, object]]:
        """Measures acceptance on the answers of held-out texts, and of as many that are learned.

        Where both are alike the head lacks steps rather than texts.

        Returns:
            By kind of text: see `Acceptance.as_dict`. Kinds of learned texts begin with `learned_`.
        """
        found = self._acceptance(self.held_out)
        learned = self._acceptance(spread(self.corpus.train, self.plan.validation_texts))
        found |= {f"learned_{kind}": facts for kind, facts in learned.items()}
        record = {"step": self.state.step, "epoch": self.state.epoch, "tokens": self.state.tokens, **found}
        if self.accelerator.is_main_process:
            put_validation(self.config.folder / "validation.jsonl", record)
        self.accelerator.log(tracker_values(found), step=self.state.step)
        return found

    def _acceptance(self, texts: list[Text]) -> dict[str, dict[str, object]]:
        """By kind of text, over all processes."""
        ranks, steps = (1, 2, 4, 8), self.plan.validation_steps
        tallies = {kind: Acceptance(steps, ranks) for kind in KIND_NAMES}
        batches = plan_batches(texts, self.plan.batch_tokens, self.plan.seed, 0)
        self.module.eval()
        for batch in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            # read like any other, since the source remembers; prompts are not what decoding guesses
            loaded, view = self._load([texts[i] for i in batch], 0)
            loaded = replace(loaded, answer=collate(loaded.texts).answer.to(loaded.answer.device))
            for kind, tally in count_acceptance(self.head, loaded, view, steps, ranks).items():
                tallies[kind].add(tally)
        self.module.train()
        found: dict[str, dict[str, object]] = {}
        for kind, tally in tallies.items():
            counts = self.accelerator.reduce(tally.counts().to(self.accelerator.device), "sum")
            if int(counts[0, 0]):
                found[KIND_NAMES[kind]] = Acceptance.from_counts(counts.cpu(), ranks).as_dict()
        return found


def _added(totals: LossSums | None, sums: LossSums, share: float) -> LossSums:
    parts = [part.detach() * share for part in (sums.loss, sums.rows, sums.per_step, sums.counted)]
    if totals is None:
        return LossSums(*parts)
    before = (totals.loss, totals.rows, totals.per_step, totals.counted)
    return LossSums(*(old + new for old, new in zip(before, parts, strict=True)))


def _fingerprint(texts: list[Text]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.number.to_bytes(8, "little") + len(text).to_bytes(8, "little"))
    return digest.hexdigest()
