# SPDX-License-Identifier: Apache-2.0
"""The run: every method on every question, interleaved prompt by prompt, each result on disk before the next."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..models.conversation import encode, messages
from ..telemetry.display import token_pieces
from .cast import Ask, Cast, Outcome
from .conversation import decode
from .journal import Journal, Line, read_lines
from .methods import CHAIN, PLAIN, Method
from .questions import Group, make_groups
from .ties import compare

WARM_UP_TOKENS = 16
RECORDS, TIES, UNAVAILABLE = "records", "ties", "unavailable"
REFUSALS = (ValueError, TypeError, NotImplementedError)
"""How generate() says that it cannot run in some way."""
FLOAT32 = "float32-"
"""Comes before these names for the run in float32, which is compared and not timed."""


@dataclass(frozen=True)
class Work:
    """What a run consists of.

    Attributes:
        chosen: questions by task.
        methods: plain first.
        batches: batch sizes; temperatures: 0 is greedy.
        max_new_tokens: most tokens of an answer.
        seed: of the order of methods and of the sampling.
        warm_up: prompts each method answers untimed before it is timed.
    """

    chosen: dict[str, list[Any]]
    methods: tuple[Method, ...]
    batches: tuple[int, ...] = (1,)
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 1024
    seed: int = 0
    warm_up: int = 3

    def groups(self, batch: int) -> list[Group]:
        return make_groups(self.chosen, batch)


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's.

    Attributes:
        rank, size: of the processes that share a run.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """As torchrun and `accelerate launch` tell it."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def take(self, groups: Sequence[Group]) -> list[Group]:
        return list(groups[self.rank :: self.size])


def interleaved(methods: Sequence[Method], group: Group, turn: int, seed: int) -> list[Method]:
    """The methods in an order of their own for every prompt, the same on every machine."""
    order = list(methods)
    random.Random(f"{seed}:{group.name}:{turn}").shuffle(order)
    return order


def sampling_seed(seed: int, group: Group, turn: int) -> int:
    """A seed for one prompt, the same for every method."""
    digest = hashlib.sha256(f"{seed}:{group.name}:{turn}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def finished(work: Work, folder: Path, prefix: str = "") -> bool:
    """Whether all processes together have done everything.

    Args:
        work: of the run; folder: of the run; prefix: as for `Runner`.
    """
    done = {
        (line["method"], line["temperature"], line["group"], line["turn"])
        for line in read_lines(folder, prefix + RECORDS)
    }
    refused = {line["method"] for line in read_lines(folder, prefix + UNAVAILABLE)}
    return all(
        (method.label(batch), temperature, group.name, turn) in done
        for batch in work.batches
        for group in work.groups(batch)
        for temperature in work.temperatures
        for method in work.methods
        if method.label(batch) not in refused
        for turn in range(group.turns)
    )


class Runner:
    """Runs one process's share of the work.

    Args:
        cast: the models.
        work: what is to be done.
        folder: of the run.
        share: of this process.
        prefix: of the names of its files.
        say: told what cannot be run, in sentences.
    """

    def __init__(
        self,
        cast: Cast,
        work: Work,
        folder: Path,
        share: Share | None = None,
        prefix: str = "",
        say: Callable[[str], None] = print,
    ) -> None:
        self.cast, self.work = cast, work
        self.share = share or Share()
        self.say = say
        self.unavailable: dict[str, str] = {}
        self._records = Journal(folder, prefix + RECORDS, self.share.rank)
        self._ties = Journal(folder, prefix + TIES, self.share.rank)
        self._refusals = Journal(folder, prefix + UNAVAILABLE, self.share.rank)
        self._done: dict[tuple[Any, ...], dict[int, Line]] = {}
        self._compared: set[str] = set()

    def run(self) -> None:
        """Do what is not yet done of this process's share."""
        for line in self._records.open():
            self._remember(line)
        self._compared = {line["group"] for line in self._ties.open()}
        self.unavailable = {line["method"]: line["reason"] for line in self._refusals.open()}
        for batch in self.work.batches:
            groups = self.share.take(self.work.groups(batch))
            methods = self._available(batch)
            if not all(self._is_done(m, batch, t, g) for g in groups for t in self.work.temperatures for m in methods):
                methods = self._warm_up(methods, batch, groups[0])
            self._run_batch(batch, groups, methods)

    def _available(self, batch: int) -> list[Method]:
        for method in self.work.methods:
            reason = method.hindrance(batch)
            if reason is not None:
                self._leave_out(method.label(batch), reason)
        return [method for method in self.work.methods if method.label(batch) not in self.unavailable]

    def _leave_out(self, label: str, reason: str) -> None:
        if label not in self.unavailable:
            self.unavailable[label] = reason
            self._refusals.append([{"method": label, "reason": reason}])

    def _warm_up(self, methods: list[Method], batch: int, group: Group) -> list[Method]:
        """Let kernels choose, weights be packed and caches fill; a method that cannot run is left out of this batch."""
        found = []
        prompts = self._prompts(group, 0, [[] for _ in group.questions])
        for method in methods:
            try:
                for temperature in self.work.temperatures:
                    ask = Ask(min(WARM_UP_TOKENS, self.work.max_new_tokens), temperature, self.work.seed)
                    for _ in range(self.work.warm_up):
                        self.cast.answer(method, prompts, ask)
            except REFUSALS as error:
                self._cannot_run(method, batch, error)
            else:
                found.append(method)
        return found

    def _cannot_run(self, method: Method, batch: int, error: Exception) -> None:
        """List a method as unavailable for this batch; what the whole run is about ends it instead."""
        if method.kind in (PLAIN, CHAIN) and batch == 1:
            raise error
        reason = " ".join(str(error).split())[:300]
        self._leave_out(method.label(batch), reason)
        self.say(f"{method.label(batch)} cannot be run: {reason}")

    def _run_batch(self, batch: int, groups: list[Group], methods: list[Method]) -> None:
        temperatures = self.work.temperatures
        total = sum(group.turns for group in groups) * len(methods) * len(temperatures)
        title = f"batch {batch}" if self.share.size == 1 else f"batch {batch}, process {self.share.rank}"
        terminal = sys.stderr.isatty()
        with tqdm(total=total, desc=title, unit="answer", mininterval=0.5 if terminal else 30.0, smoothing=0.05) as bar:
            for group in groups:
                for temperature in temperatures:
                    for turn in range(group.turns):
                        for method in interleaved(methods, group, turn, self.work.seed):
                            bar.set_postfix_str(f"{group.questions[0].task} {method.kind}", refresh=False)
                            self._answer(method, batch, temperature, group, turn)
                            bar.update()
                    if temperature == 0:
                        self._compare(methods, batch, group)

    def _answer(self, method: Method, batch: int, temperature: float, group: Group, turn: int) -> None:
        label = method.label(batch)
        if (label, temperature, group.name, turn) in self._done or label in self.unavailable:
            return
        prompts = self._prompts(group, turn, self._answers(method, batch, temperature, group, turn))
        ask = Ask(self.work.max_new_tokens, temperature, sampling_seed(self.work.seed, group, turn))
        try:
            outcome = self.cast.answer(method, prompts, ask)
        except REFUSALS as error:
            # Without a warm-up the first answer is what finds it out; a method that has answered before can run.
            if any(done == label for done, *_ in self._done):
                raise
            self._cannot_run(method, batch, error)
            return
        lines = self._lines(method, batch, temperature, group, turn, prompts, outcome)
        self._records.append(lines[: group.own])
        for line in lines:
            self._remember(line)

    def _answers(self, method: Method, batch: int, temperature: float, group: Group, turn: int) -> list[list[str]]:
        """What the method itself said in the turns before, row by row."""
        found: list[list[str]] = [[] for _ in group.questions]
        for earlier in range(turn):
            rows = self._done[method.label(batch), temperature, group.name, earlier]
            for row in range(len(group.questions)):
                # A row that only fills the batch is not on file: after a kill it goes on with an earlier row's answer.
                found[row].append(str(rows[row if row in rows else row % group.own]["output"]))
        return found

    def _prompts(self, group: Group, turn: int, answers: list[list[str]]) -> list[list[int]]:
        cast = self.cast
        return [
            encode(cast.tokenizer, messages(question.turns[: turn + 1], said, cast.system), cast.template)
            for question, said in zip(group.questions, answers, strict=True)
        ]

    def _lines(
        self,
        method: Method,
        batch: int,
        temperature: float,
        group: Group,
        turn: int,
        prompts: list[list[int]],
        outcome: Outcome,
    ) -> list[Line]:
        """One record per row; what belongs to the whole call stands in the first."""
        lines = []
        for row, question in enumerate(group.questions):
            ids = outcome.rows[row]
            line: Line = {
                "question_id": question.question_id,
                "category": question.category,
                "task": question.task,
                "method": method.label(batch),
                "decoder": method.name,
                "temperature": temperature,
                "turn": turn,
                "batch_size": batch,
                "group": group.name,
                "row": row,
                "own": group.own,
                "output": decode(self.cast.tokenizer, ids),
                "output_ids": ids,
                "references": list(question.references) if turn == 0 else [],
                "prompt_tokens": len(prompts[row]),
                "prompt_sha": hashlib.sha256(repr(prompts[row]).encode()).hexdigest()[:16],
                "new_tokens": len(ids),
            }
            if outcome.token_levels is not None:
                line["pieces"] = token_pieces(self.cast.tokenizer, ids, outcome.token_levels[row])
            if row == 0:
                line |= {
                    "seconds": outcome.seconds,
                    "group_tokens": sum(len(one) for one in outcome.rows),
                    "target_passes": outcome.target_passes,
                    "peak_bytes": outcome.peak_bytes,
                    "rise_bytes": outcome.rise_bytes,
                    "levels": outcome.levels,
                }
            lines.append(line)
        return lines

    def _compare(self, methods: list[Method], batch: int, group: Group) -> None:
        """Compare every greedy answer with plain's to the same prompt, and keep what differs.

        Where plain itself cannot be run there is nothing to compare with.
        """
        if group.name in self._compared:
            return
        differences = []
        plain = Method(PLAIN)
        methods = [method for method in methods if method.label(batch) not in self.unavailable]
        for turn in range(group.turns) if plain in methods else ():
            theirs = self._done[plain.label(batch), 0.0, group.name, turn]
            prompts = self._prompts(group, turn, self._answers(plain, batch, 0.0, group, turn))
            for method in methods:
                ours = self._done[method.label(batch), 0.0, group.name, turn]
                for row in range(group.own):
                    if method == plain or ours[row]["prompt_sha"] != theirs[row]["prompt_sha"]:
                        continue
                    answers = theirs[row]["output_ids"], ours[row]["output_ids"]
                    found = compare(self.cast.target, self.cast.tokenizer, prompts[row], *answers)
                    if found is not None:
                        where = {name: ours[row][name] for name in ("question_id", "task", "turn", "method")}
                        differences.append(where | {"batch_size": batch} | found)
        self._ties.append([{"group": group.name, "differences": differences}])
        self._compared.add(group.name)

    def _remember(self, line: Line) -> None:
        key = (line["method"], line["temperature"], line["group"], line["turn"])
        self._done.setdefault(key, {})[line["row"]] = line

    def _is_done(self, method: Method, batch: int, temperature: float, group: Group) -> bool:
        turns = range(group.turns)
        return all((method.label(batch), temperature, group.name, turn) in self._done for turn in turns)
