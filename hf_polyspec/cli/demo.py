# SPDX-License-Identifier: Apache-2.0
"""The demo: one prompt answered by plain generate() and by every chain, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from ..generation.doors import attach
from ..host.configs import generation_config
from ..host.waiting import wait_for
from ..levels.names import short_name
from ..models.assistants import AUTO
from ..models.conversation import encode_prompt
from ..models.packaged import HEAD, PACKAGE
from ..telemetry.stats import PolySpecStats

DEFAULT_MODEL = PACKAGE
# A text to be edited: much of the answer stands in the prompt, which is where n-grams draft well. On free prose they
# find little and a chain over them gains little or nothing; `--prompt` shows either.
DEFAULT_PROMPT = (
    "Correct the spelling mistakes in this text and give me the whole text:\n\n"
    "The harbour wakes up before the sun rises. The fishermen carry there nets to the boats, and the gulls circle "
    "above them. The oldest fisherman looks at the sky and says that the wind will turn befor noon. Nobody answers "
    "him, because the oldest fisherman is allways right. One after another, the boats leave the harbour, and the "
    "gulls folow them until the harbour is out of sihgt."
)
WARM_UP_TOKENS = 12
PLAIN = "plain generate()"
ALONE = "the model alone"


def default_assistants(model: str) -> list[str]:
    """The chain that the demo takes apart where the user named none: a quantised copy, and what drafts below.

    Args:
        model: its name; the one for which a trained head ships with the package gets the head as well.
    """
    return ["int8", HEAD, "suffix"] if model == PACKAGE else ["int8", "suffix"]


def chain_name(names: Sequence[str]) -> str:
    """What a chain is called, by its assistants."""
    return " + ".join(names) or ALONE


@dataclass(frozen=True)
class Request:
    """What is to be generated, the same for every chain.

    Attributes:
        prompt: the user's text.
        max_new_tokens: 1 or more.
        temperature: 0 for greedy.
        seed: of the sampling.
        options: options of the chain, such as `polyspec_block_size`.
    """

    prompt: str
    max_new_tokens: int = 160
    temperature: float = 0.0
    seed: int = 0
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("The prompt is empty.")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}.")


@dataclass(frozen=True)
class Answer:
    """What one chain made of a request.

    Attributes:
        name: of the chain.
        sequence: prompt and generated ids.
        prompt_length: how many of them are prompt.
        seconds: wall time of generate().
        stats: telemetry; None for plain generate().
    """

    name: str
    sequence: list[int]
    prompt_length: int
    seconds: float
    stats: PolySpecStats | None

    @property
    def generated(self) -> list[int]:
        """The generated ids."""
        return self.sequence[self.prompt_length :]

    @property
    def tokens_per_second(self) -> float:
        return len(self.generated) / self.seconds if self.seconds else 0.0


class ConsoleStreamer(TextStreamer):
    """Prints text as it arrives, on a rich console and without reading it as markup."""

    asks_nobody = True

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.out(text, end="\n" if stream_end else "", highlight=False)


def answer(
    model: Any, tokenizer: Any, assistants: Sequence[Any] | None, request: Request, name: str, streamer: Any = None
) -> Answer:
    """Answer a request with one chain.

    Args:
        model: the target; `attach` is called on it.
        tokenizer: the target's.
        assistants: the levels below, an empty list for the target alone; None for plain generate().
        request: what to generate.
        name: of the chain.
        streamer: gets the tokens, or None.

    Raises:
        ValueError, TypeError: as `generate(assistant_models=...)`.
    """
    inputs = encode_prompt(tokenizer, request.prompt, model.device)
    pad = getattr(tokenizer, "pad_token_id", None)
    config = generation_config(model, request.max_new_tokens, request.temperature, pad)
    arguments: dict[str, Any] = {"generation_config": config}
    if assistants is not None:
        attach(model)
        arguments |= {"assistant_models": list(assistants), **(request.options or {})}
    torch.manual_seed(request.seed)
    wait_for(model.device)
    started = time.perf_counter()
    output = model.generate(**inputs, streamer=streamer, **arguments)
    wait_for(model.device)
    seconds = time.perf_counter() - started
    ids = output.sequences[0].tolist()
    return Answer(name, ids, inputs["input_ids"].shape[1], seconds, getattr(output, "polyspec", None))


def run_demo(
    model: Any,
    tokenizer: Any,
    assistants: Sequence[Any],
    names: Sequence[str],
    request: Request,
    console: Console,
    auto: bool = False,
) -> list[Answer]:
    """Answer with plain generate(), with the last assistant, with the last two, and so on; then compare.

    Args:
        model: the target; tokenizer: its own.
        assistants: the levels below, the slowest first; names: how to call them. Without any, plain generate() is
            compared with the target alone.
        request: what to generate.
        console: where everything is printed; auto: whether "auto" answers last.

    Returns:
        The answers, plain generate() first.
    """
    console.rule("prompt", align="left")
    console.print(request.prompt + "\n", style="dim", markup=False, highlight=False)
    # Quantised layers pack their weights, caches of kernels fill, and functions are compiled when they are first
    # needed, which may be late in a chain's answer: chains warm up with all of it.
    short = replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens))
    answers = []
    chains: list[tuple[str, list[Any] | None]] = [(PLAIN, None)]
    for depth in range(1, len(assistants) + 1) if assistants else [0]:
        levels = list(assistants)[len(assistants) - depth :]
        chains.append((chain_name(names[len(names) - depth :]), levels))
    if auto:
        chains.append((AUTO, [AUTO]))
    for name, below in chains:
        with console.status(f"warming up {name}"):
            answer(model, tokenizer, below, request if below else short, name)
        console.rule(name, align="left")
        streamer = ConsoleStreamer(tokenizer, console)
        answers.append(answer(model, tokenizer, below, request, name, streamer))
        last = answers[-1]
        console.print(
            f"{len(last.generated)} tokens in {last.seconds:.2f} s, {last.tokens_per_second:.1f} tokens/s\n",
            style="dim",
            highlight=False,
        )
    console.rule("result", align="left")
    for sentence in verdict(answers, request, model, tokenizer):
        console.print(sentence, markup=False, highlight=False)
    console.print(result_table(answers, short_name(str(model.name_or_path))))
    return answers


def verdict(answers: Sequence[Answer], request: Request, model: Any, tokenizer: Any) -> list[str]:
    """Whether the chains said what plain generate() said, in sentences; a difference is shown with its logits."""
    if request.temperature > 0:
        return [
            f"Sampled at temperature {request.temperature:g}: the texts differ by chance, as those of two plain runs "
            "do; every one of them is a draw from the target's own distribution."
        ]
    plain = answers[0]
    sentences = []
    for other in answers[1:]:
        place = first_difference(plain.generated, other.generated)
        if place is None:
            continue
        choices = [one.generated[place : place + 1] for one in (plain, other)]
        words = [repr(tokenizer.decode(ids)) if ids else "the end" for ids in choices]
        sentence = f"{other.name} differs from {PLAIN} from token {place} on: {words[1]} instead of {words[0]}"
        if all(choices):
            gap = _logit_gap(model, plain.sequence[: plain.prompt_length + place], choices[0][0], choices[1][0])
            sentence += f", whose logits in the target are {gap:.1e} apart"
        sentences.append(sentence + ".")
    count = len(answers)
    return sentences or [f"The {count} texts are identical, token for token ({len(plain.generated)} tokens each)."]


@torch.no_grad()
def _logit_gap(model: Any, prefix: list[int], one: int, other: int) -> float:
    logits = model(input_ids=torch.tensor([prefix], device=model.device)).logits[0, -1].float()
    return float((logits[one] - logits[other]).abs())


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts differ, None if they do not; where one ends counts."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


def result_table(answers: Sequence[Answer], target: str) -> Table:
    """Speed of every chain, and how many tokens each of its levels emits per pass."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("chain", overflow="fold")
    for heading in ("tokens", "tokens/s", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("mean acceptance length per level", overflow="fold")
    plain = answers[0]
    for row in answers:
        lengths = []
        for level in row.stats.levels if row.stats is not None else []:
            if level.mean_acceptance_length is not None:
                name = "target" if level.index == 0 else level.name.removeprefix(f"{target} ")
                lengths.append(f"{name} {level.mean_acceptance_length:.2f}")
        speed_up = row.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0
        table.add_row(
            row.name,
            str(len(row.generated)),
            f"{row.tokens_per_second:.1f}",
            f"{speed_up:.2f}x",
            ", ".join(lengths).replace("[", r"\[") or "1 by definition",
        )
    return table
