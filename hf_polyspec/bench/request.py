# SPDX-License-Identifier: Apache-2.0
"""From what a user wrote to what is to be run; everything that can be refused is refused here, before any model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.assistants import AUTO, NONE
from ..models.by_name import check_device, read_dtype
from .cast import CastRequest
from .methods import Method, expand, sweep
from .presets import Preset, load_preset
from .questions import WHERE, Question, read_questions, select
from .runner import Work


@dataclass(frozen=True)
class Asked:
    """The options of `polyspec bench`, as they came; None where the user said nothing."""

    questions: str | None
    model: str | None
    preset: str | None
    assistants: Sequence[str]
    methods: Sequence[str]
    sweeps: Sequence[str]
    tasks: str | None
    limit: int | None
    seed: int
    max_new_tokens: int | None
    temperatures: str
    batch_sizes: str
    dtype: str | None
    device: str
    pack: bool
    plan: str | None
    warm_up: int
    float32: int | None
    breakdown: bool


def spelled(asked: Asked, output: Path, device: str) -> str:
    """The command line that asks for the same, defaults left out.

    Args:
        asked: the options of one process; output: the folder of the run.
        device: as the user gave it, before each process took its own.
    """
    parts = ["polyspec", "bench"]
    for name, value, default in (
        ("--preset", asked.preset, None),
        ("--model", asked.model, None),
        ("--questions", asked.questions, None),
        ("--tasks", asked.tasks, None),
        ("--limit", asked.limit, None),
        ("--seed", asked.seed, 0),
        ("--max-new-tokens", asked.max_new_tokens, None),
        ("--temperature", asked.temperatures, "0"),
        ("--batch-size", asked.batch_sizes, "1"),
        ("--dtype", asked.dtype, None),
        ("--device", device, "cpu"),
        ("--plan", asked.plan, None),
        ("--warm-up", asked.warm_up, 3),
        ("--float32-questions", asked.float32, None),
    ):
        if value != default:
            parts += [name, str(value)]
    for name, values in (("--assistant", asked.assistants), ("--methods", asked.methods), ("--sweep", asked.sweeps)):
        for value in values:
            parts += [name, value]
    parts += [] if asked.pack else ["--no-pack"]
    parts += [] if asked.breakdown else ["--no-breakdown"]
    return shlex.join([*parts, "--output", str(output)])


@dataclass(frozen=True)
class Run:
    """A run, ready to be started once its models are there.

    Attributes:
        cast: which models.
        chosen: questions by task.
        words: method names as the user gave them, None for all there are.
        sweeps: option and values.
        settings: what a resumed run must share, under the names of the options.
        batches, temperatures, max_new_tokens, seed, warm_up: as in `Work`.
        float32: questions of a task that are also answered in float32; 0 for none.
        breakdown: whether the time of one answer of each chain is split by kind of work.
    """

    cast: CastRequest
    chosen: dict[str, list[Question]]
    words: list[str] | None
    sweeps: dict[str, list[str]]
    settings: dict[str, Any]
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]
    max_new_tokens: int
    seed: int
    warm_up: int
    float32: int
    breakdown: bool

    def methods(self, drafters: Sequence[str], plan: bool) -> list[Method]:
        """The methods, once it is known which assistants are models."""
        names = [name for name, _ in self.cast.assistants]
        return sweep(expand(self.words, names, drafters, plan), self.sweeps, drafters)

    def work(self, methods: Sequence[Method]) -> Work:
        """All of the work."""
        return Work(
            self.chosen,
            tuple(methods),
            self.batches,
            self.temperatures,
            self.max_new_tokens,
            self.seed,
            self.warm_up,
        )

    def work_in_float32(self, methods: Sequence[Method]) -> Work:
        """What is done once more in float32: greedy, one row at a time."""
        chosen = {task: questions[: self.float32] for task, questions in self.chosen.items()}
        return Work(chosen, tuple(methods), (1,), (0.0,), self.max_new_tokens, self.seed, 1)


def read_request(asked: Asked) -> Run:
    """Check everything that can be checked without a model.

    Raises:
        ValueError: in one sentence, the first thing that is wrong.
    """
    preset = None if asked.preset is None else load_preset(asked.preset)
    model = asked.model or (preset.model if preset else None)
    if model is None:
        raise ValueError("polyspec bench needs --model, or a --preset that names one.")
    if asked.questions is None:
        raise ValueError(f"polyspec bench needs --questions: {WHERE}.")
    temperatures = _numbers(asked.temperatures, "--temperature", float, 0)
    batches = tuple(int(value) for value in _numbers(asked.batch_sizes, "--batch-size", int, 1))
    tokens = asked.max_new_tokens or (preset.max_new_tokens if preset else 1024)
    _check_counts(asked, tokens)
    dtype = asked.dtype or (preset.dtype if preset else "float32")
    read_dtype(dtype)
    check_device(asked.device)
    if asked.plan is not None and not Path(asked.plan).expanduser().is_file():
        raise ValueError(f"There is no plan {asked.plan}; polyspec plan writes one.")
    assistants = read_assistants(asked.assistants, preset)
    sweeps = read_sweeps(asked.sweeps)
    words = _words(asked.methods) or (list(preset.methods) if preset and preset.methods else None)
    names = [name for name, _ in assistants]
    # Names of methods are checked with every assistant taken for a model; which are drafters is known after loading.
    sweep(expand(words, names, [], asked.plan is not None), sweeps, [])
    questions, digest = read_questions(asked.questions)
    tasks = None if asked.tasks is None else [part.strip() for part in asked.tasks.split(",") if part.strip()]
    chosen = select(questions, tasks, asked.limit, asked.seed)
    cast = CastRequest(
        model,
        assistants,
        dtype,
        asked.device,
        asked.pack,
        asked.plan,
        preset.chat_template if preset else None,
        preset.system if preset else None,
        tuple(preset.stop) if preset else None,
    )
    settings = _settings(asked, cast, words, sweeps, digest, chosen, tokens, temperatures, batches)
    most = max(len(found) for found in chosen.values())
    in_float32 = 0 if dtype in ("float32", "fp32") else most if asked.float32 is None else asked.float32
    if 0.0 not in temperatures:
        in_float32 = 0
    return Run(
        cast,
        chosen,
        words,
        sweeps,
        settings,
        batches,
        temperatures,
        tokens,
        asked.seed,
        asked.warm_up,
        in_float32,
        asked.breakdown,
    )


def _settings(
    asked: Asked,
    cast: CastRequest,
    words: list[str] | None,
    sweeps: dict[str, list[str]],
    digest: str,
    chosen: dict[str, list[Question]],
    tokens: int,
    temperatures: tuple[Any, ...],
    batches: tuple[int, ...],
) -> dict[str, Any]:
    """What a resumed run must share, under the names of the options."""
    return {
        "--model": cast.model,
        "--preset": asked.preset,
        "--assistant": [f"{name}={word}" for name, word in cast.assistants],
        "--methods": words,
        "--sweep": [f"{key}={','.join(values)}" for key, values in sweeps.items()],
        "--questions (SHA-256)": digest,
        "--tasks": list(chosen),
        "--limit": asked.limit,
        "--seed": asked.seed,
        "--max-new-tokens": tokens,
        "--temperature": list(temperatures),
        "--batch-size": list(batches),
        "--dtype": cast.dtype,
        "--device": asked.device,
        "--pack": asked.pack,
        "--plan": asked.plan,
        "--warm-up": asked.warm_up,
        "--float32-questions": asked.float32,
    }


def _check_counts(asked: Asked, tokens: int) -> None:
    for name, value, least in (
        ("--max-new-tokens", tokens if asked.max_new_tokens is None else asked.max_new_tokens, 1),
        ("--warm-up", asked.warm_up, 0),
        ("--float32-questions", asked.float32 or 0, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def read_assistants(given: Sequence[str], preset: Preset | None) -> tuple[tuple[str, str], ...]:
    """Names and what to load, the slowest first; the user's take the place of a preset's of the same name.

    Raises:
        ValueError: a name is given twice or cannot be part of a method's name.
    """
    found = dict(preset.assistants) if preset else {}
    mine: set[str] = set()
    for text in given:
        name, equals, word = text.partition("=")
        if not equals:
            name = word = text
            if any(mark in name for mark in "/\\@, ;"):
                raise ValueError(
                    f"--assistant {text} needs a short name to go by in methods, as in --assistant head={text}."
                )
        if not name or not word or any(mark in name for mark in "@,;: "):
            raise ValueError(f"--assistant {text}: write NAME=WHAT, the name without spaces and the marks @ , ; :.")
        if name in (NONE, AUTO):
            raise ValueError(f"--assistant {text}: {name} has a meaning of its own in methods; give it another name.")
        if word in (NONE, AUTO):
            raise ValueError(f"--assistant {text}: {word} is no level; polyspec:{word} is a method, for --methods.")
        if name in mine:
            raise ValueError(f"--assistant gives the name {name!r} twice.")
        mine.add(name)
        found[name] = word
    return tuple(found.items())


def read_sweeps(given: Sequence[str]) -> dict[str, list[str]]:
    """Options and the values to try, from `block=4,8,12`.

    Raises:
        ValueError: it is not written so.
    """
    found: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        listed = [value.strip() for value in values.split(",") if value.strip()]
        if not equals or not listed:
            raise ValueError(f"--sweep takes an option of chains and its values, as in block=4,8,12; got {text!r}.")
        found[key.strip()] = listed
    return found


def _words(given: Sequence[str]) -> list[str]:
    return [word for text in given for word in text.replace(";", " ").split()]


def _numbers(text: str, name: str, kind: type, least: float) -> tuple[Any, ...]:
    found: list[Any] = []
    for part in text.split(","):
        try:
            value = kind(part)
        except ValueError:
            raise ValueError(f"{name} takes numbers separated by commas, got {text!r}.") from None
        if not math.isfinite(value) or value < least:
            raise ValueError(f"{name} must be at least {least}, got {part.strip()}.")
        found.append(value)
    return tuple(dict.fromkeys(found))
