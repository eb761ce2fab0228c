# SPDX-License-Identifier: Apache-2.0
"""Self-generated training texts: the target answers prompts, its own or the user's, in full batches.

A draft head learns best from what its target really writes (EAGLE-3, arXiv 2503.01840, section 4). A run can be
killed at any moment: every sample's random numbers follow from its number alone, and finished samples are on disk
in whole shards, so a second start makes exactly the samples that are missing.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_polyspec.eagle.training.jobs import Job, draw, stop_ids
from hf_polyspec.eagle.training.prompts import (
    ChatFrame,
    PromptFilter,
    RefusedPromptError,
    asked,
    chat_frame,
    normalise,
    prompt_ids,
    sample_random,
    whole_sentences,
)
from hf_polyspec.eagle.training.shards import GREEDY, SAMPLED, Sample, ShardWriter, read_progress, read_samples
from hf_polyspec.eagle.training.slots import open_batch
from hf_polyspec.eagle.training.stopping import StopRequest
from hf_polyspec.storage.atomic import write_json

_LOG = logging.getLogger(__name__)
# so many prompts that a template refuses are told of, each with the template's words
_TOLD = 5


@dataclass(frozen=True)
class GenerationSettings:
    """How texts are made.

    Args:
        max_tokens: ids (prompts included) after which the run ends, over all processes.
        slots: texts written at the same time.
        max_new_tokens: longest answer.
        max_prompt_tokens: longest prompt; longer ones of a user's file are left out.
        greedy_fraction: share of answers written greedily, the others are sampled.
        temperature: of sampled answers and invented prompts.
        seed: decides every random choice.
        shard_tokens: ids in a shard.
        min_words: fewest words of an invented prompt.
        ascii_ratio: smallest share of ASCII characters in an invented prompt.
        samples_per_prompt: answers for each prompt of a user's file.
        keep_states: keep on disk what the writer computed (2 * (F + H_t) + 4 bytes an id), so that a reader of the
            same kind need not read the texts; for prompts that are not learned.
    """

    max_tokens: int = 3_000_000
    slots: int = 64
    max_new_tokens: int = 256
    max_prompt_tokens: int = 192
    greedy_fraction: float = 0.5
    temperature: float = 1.0
    seed: int = 0
    shard_tokens: int = 100_000
    min_words: int = 3
    ascii_ratio: float = 0.9
    samples_per_prompt: int = 1
    keep_states: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "slots", "max_new_tokens", "max_prompt_tokens", "shard_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0.0 <= self.greedy_fraction <= 1.0:
            raise ValueError(f"greedy_fraction must be between 0 and 1, not {self.greedy_fraction}")
        if self.temperature <= 0.0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")


@dataclass
class GenerationState:
    """What a run has done so far, for progress bars and the status file.

    Args:
        tokens: ids on disk or waiting, earlier runs included.
        samples: likewise.
        new_tokens: ids of finished samples of this run.
        rejected: invented prompts filtered out in this run.
        refused: prompts of this run that the chat template refused.
        steps: forward passes of this run.
        started: when this run began, seconds since the epoch.
    """

    tokens: int = 0
    samples: int = 0
    new_tokens: int = 0
    rejected: int = 0
    refused: int = 0
    steps: int = 0
    started: float = field(default_factory=time.time)

    @property
    def tokens_per_second(self) -> float:
        """Ids of finished samples a second, this run."""
        return self.new_tokens / max(time.time() - self.started, 1e-9)


class Generator:
    """Writes samples into a folder until told to stop.

    Args:
        model: the target, or a faster stand-in whose texts are close to the target's.
        tokenizer: the target's.
        folder: where shards and the status file go.
        settings: how texts are made.
        prompts: conversations to answer, or None to let the model invent them.
        excluded: normalised prompts that must not be used.
        rank: number of this process.
        world: how many processes share the work.
        writer_name: what the shards say about who wrote them.
        watched: indices into `hidden_states` whose states are kept, None for none.
        whose_states: see `kept_states.identity`.

    Raises:
        ValueError: states are to be kept of a model that cannot run in slots.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        settings: GenerationSettings,
        prompts: list[list[dict[str, str]]] | None = None,
        excluded: frozenset[str] = frozenset(),
        rank: int = 0,
        world: int = 1,
        writer_name: str = "target",
        watched: Sequence[int] | None = None,
        whose_states: str = "",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.folder = folder
        self.settings = settings
        self.prompts = prompts
        self.rank, self.world = rank, world
        self.frame = chat_frame(tokenizer) if prompts is None else ChatFrame((), None)
        self.stops = stop_ids(model, tokenizer)
        self.specials = frozenset(int(i) for i in tokenizer.all_special_ids)
        self.filter = PromptFilter(
            settings.min_words, settings.max_prompt_tokens, settings.ascii_ratio, excluded, self._seen()
        )
        done = read_progress(folder)
        self.state = GenerationState(tokens=done.tokens, samples=done.samples)
        # this process's part of what is missing, on top of what is there
        self.share = done.tokens + -(-(settings.max_tokens - done.tokens) // world)
        self.exhausted = False
        self.refusal = ""
        self.pending: Iterator[int] = self._numbers(done.numbers)
        self.ready: deque[Job] = deque()
        provenance = {key: str(value) for key, value in asdict(settings).items()}
        provenance["model"] = Path(str(model.config._name_or_path)).name
        provenance["writer"] = writer_name
        provenance["prompts"] = "invented by the target" if prompts is None else f"{len(prompts)} of the user's"
        self.writer = ShardWriter(folder, rank, model.config.get_text_config().vocab_size, provenance, whose_states)
        # the widest frame around a prompt: header, closing and the opening of the answer
        frame = 64 + len(self.frame.header)
        capacity = settings.max_prompt_tokens + settings.max_new_tokens + frame
        # a stand-in's texts are close to the target's, not the same: its attention may round as well
        self.batch = open_batch(model, settings.slots, capacity, compact=writer_name != "target", watched=watched)
        self.capacity = capacity
        self.jobs: list[Job | None] = [None] * settings.slots

    def run(
        self, deadline: float | None = None, report: Callable[[GenerationState], None] | None = None
    ) -> GenerationState:
        """Writes samples until enough are there, the time is up, or the process is asked to end.

        Args:
            deadline: seconds since the epoch at which to stop, or None.
            report: called after every step.

        Returns:
            What was done. Everything finished is on disk; what was under way is begun anew by the next run.

        Raises:
            ValueError: the chat template refuses every prompt.
        """
        next_status = 0.0
        with StopRequest(deadline) as stop:
            while self.state.tokens < self.share and not stop.asked:
                self._refill()
                if all(job is None for job in self.jobs):
                    self.exhausted = True  # every prompt of the user's file is answered
                    break
                self._step()
                if report is not None:
                    report(self.state)
                if time.time() >= next_status:
                    self._write_status("running")
                    next_status = time.time() + 30
        if self.prompts and self.state.refused == len(self.prompts) * self.settings.samples_per_prompt:
            # noting them on disk would keep a mended template from being asked again
            raise ValueError(f"none of the {len(self.prompts)} prompts can be answered: {self.refusal}")
        self.writer.flush()
        self._write_status("finished" if self.complete else "stopped")
        return self.state

    @property
    def complete(self) -> bool:
        """Whether this process has nothing left to write."""
        return self.exhausted or self.state.tokens >= self.share

    def _seen(self) -> set[str]:
        """Prompts already answered, so that a resumed run filters the same duplicates."""
        if self.prompts is not None or not any(self.folder.glob("shard-*.safetensors")):
            return set()
        opening = self.tokenizer.decode(self.frame.header)
        texts = (self.tokenizer.decode(sample.tokens[: sample.prompt_length]) for sample in read_samples(self.folder))
        closing = "" if self.frame.closing is None else self.tokenizer.decode([self.frame.closing])
        return {normalise(text.removeprefix(opening).split(closing or "\0")[0]) for text in texts}

    def _numbers(self, done: frozenset[int]) -> Iterator[int]:
        """This process's numbers that are neither on disk nor filtered out."""
        number = self.rank
        total = None if self.prompts is None else len(self.prompts) * self.settings.samples_per_prompt
        while total is None or number < total:
            if number not in done:
                yield number
            number += self.world

    def _next_job(self) -> Job | None:
        if self.ready:
            return self.ready.popleft()
        for number in self.pending:
            job = self._begin(number)
            if job is not None:
                return job
            self.writer.reject(number)
            self.state.rejected += 1
        return None

    def _begin(self, number: int) -> Job | None:
        """The first job of a sample, or None when its prompt cannot be used."""
        settings = self.settings
        if self.prompts is None:
            if self.frame.closing is None:
                return self._answer(number, list(self.frame.header))
            dice = sample_random(settings.seed, number, "prompt")
            header = list(self.frame.header)
            return Job(number, True, header, len(header), settings.max_prompt_tokens, SAMPLED, dice)
        turns = self.prompts[number % len(self.prompts)]
        ids = self._rendered(turns, f"prompt {number % len(self.prompts) + 1} of the file")
        if ids is None:
            return None
        if asked(turns) & self.filter.excluded:
            return None
        return self._answer(number, ids)

    def _rendered(self, turns: list[dict[str, str]], which: str) -> list[int] | None:
        """A conversation's ids, or None, with a note, where the chat template refuses it."""
        try:
            return prompt_ids(self.tokenizer, turns)
        except RefusedPromptError as refusal:
            self.state.refused += 1
            self.refusal = str(refusal)
            if self.state.refused <= _TOLD:
                more = "; further ones are left out silently" if self.state.refused == _TOLD else ""
                _LOG.warning("%s is left out: %s%s", which, refusal, more)
            return None

    def _answer(self, number: int, ids: list[int]) -> Job | None:
        """The job of answering a prompt, or None when the prompt is too long."""
        if len(ids) + self.settings.max_new_tokens > self.capacity:
            return None
        greedy = sample_random(self.settings.seed, number, "kind").random() < self.settings.greedy_fraction
        if self.prompts is not None and number >= len(self.prompts):
            greedy = False  # a second greedy answer would be the first one again
        dice = sample_random(self.settings.seed, number, "answer")
        kind = GREEDY if greedy else SAMPLED
        return Job(number, False, ids, len(ids), self.settings.max_new_tokens, kind, dice)

    def _refill(self) -> None:
        idle = [row for row, job in enumerate(self.jobs) if job is None]
        if not self.batch.refillable and len(idle) < len(self.jobs):
            return
        rows, prompts = [], []
        for row in idle:
            job = self._next_job()
            if job is None:
                break
            job.fed = len(job.tokens) - 1
            self.jobs[row] = job
            rows.append(row)
            prompts.append(job.tokens)
        if not rows:
            return
        self.batch.fill(rows, prompts)
        if self.batch.seen is not None:
            for row, states in zip(rows, self.batch.seen, strict=True):
                job = self.jobs[row]
                if job is not None:
                    job.look(states[: job.fed])

    def _step(self) -> None:
        tokens = [0 if job is None else job.tokens[job.fed] for job in self.jobs]
        logits = self.batch.step(torch.tensor(tokens, device=self.model.device))  # [B, V]
        drawing, states = [], self.batch.seen
        for row, job in enumerate(self.jobs):
            if job is not None:
                job.fed += 1
                if states is not None:
                    job.look(states[row])
                if job.fed == len(job.tokens):
                    drawing.append((row, job))
        if drawing:
            self._draw(logits, drawing)
        self.state.steps += 1
        if self.writer.waiting_tokens >= self.settings.shard_tokens:
            self.writer.flush()

    def _draw(self, logits: torch.Tensor, drawing: list[tuple[int, Job]]) -> None:
        rows = torch.tensor([row for row, _ in drawing], device=logits.device)
        uniforms = torch.tensor(
            [-1.0 if job.kind == GREEDY else job.random.random() for _, job in drawing], device=logits.device
        )
        drawn, best = (ids.tolist() for ids in draw(logits[rows], uniforms, self.settings.temperature))
        for (row, job), token, likeliest in zip(drawing, drawn, best, strict=True):
            job.tokens.append(token)
            if job.best:
                job.best[-1] = likeliest
            if job.asking:
                self._continue_asking(row, job, token)
            elif token in self.stops or len(job.tokens) - job.start >= job.limit:
                self._finish(row, job)

    def _continue_asking(self, row: int, job: Job, token: int) -> None:
        ended = token == self.frame.closing or token in self.stops
        if not ended and token not in self.specials and len(job.tokens) - job.start < job.limit:
            return
        if ended:
            text = str(self.tokenizer.decode(job.tokens[job.start : -1])).strip()
        else:
            # too long or strayed into another special id: what came before its last full sentence is a prompt too
            text = whole_sentences(str(self.tokenizer.decode(job.tokens[job.start : -1])))
        if not self.filter.accepts(text, len(job.tokens) - job.start - 1):
            self._drop(row, job)
            return
        ids = self._rendered([{"role": "user", "content": text}], "an invented prompt")
        answer = None if ids is None else self._answer(job.number, ids)
        if answer is None:
            self._drop(row, job)
            return
        if self.batch.refillable and answer.tokens[: job.fed] == job.tokens[: job.fed]:
            # the slot already holds this prompt's beginning: only the closing is left to feed
            answer.fed, answer.states, answer.best = job.fed, job.states, job.best
            self.jobs[row] = answer
            return
        self._free(row)
        self.ready.append(answer)

    def _drop(self, row: int, job: Job) -> None:
        self.writer.reject(job.number)
        self.state.rejected += 1
        self._free(row)

    def _finish(self, row: int, job: Job) -> None:
        self.writer.add(Sample(job.number, tuple(job.tokens), job.start, job.kind, job.seen()))
        self.state.tokens += len(job.tokens)
        self.state.new_tokens += len(job.tokens)
        self.state.samples += 1
        self._free(row)

    def _free(self, row: int) -> None:
        self.jobs[row] = None
        self.batch.release(row)

    def _write_status(self, phase: str) -> None:
        state = self.state
        facts = {
            "phase": phase,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tokens": state.tokens,
            "tokens_on_disk": state.tokens - self.writer.waiting_tokens,
            "samples": state.samples,
            "rejected_prompts_this_run": state.rejected,
            "refused_by_the_template_this_run": state.refused,
            "tokens_per_second": round(state.tokens_per_second, 1),
            "steps": state.steps,
        }
        suffix = "" if self.world == 1 else f"-{self.rank}"
        write_json(self.folder / f"STATUS{suffix}", facts, indent=1)
