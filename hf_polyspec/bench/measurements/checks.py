# SPDX-License-Identifier: Apache-2.0
"""What it costs to check a draft once the logits are there: `polyspec measure checks`.

Greedy; sampled under shared noise, which draws for every step what plain generate() draws for it; and that draw alone.
A sampled check should cost no more than a greedy one and the draw. With --model whole answers too: sampled so cold that
the text, the drafts and the passes are those of the greedy answer, so that what is between them is sampling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...exactness.context import Context, Prompt
from ...exactness.distributions import LawMaker
from ...exactness.judgement import judge
from ...exactness.noise import SharedNoise, by_torch
from ...exactness.proposal import Proposal
from ...generation.doors import generate
from ...models.environment import describe
from . import arguments

CPU = torch.device("cpu")
COLD = 1e-4
"""A temperature at which the likeliest token wins every race, short of a tie."""


def check_times(width: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Medians of interleaved runs, in seconds.

    Args:
        width: tokens of the draft, all of which are kept; vocabulary: ids; repeats: runs of each.

    Returns:
        "greedy", "sampled" and "draw".
    """
    dice = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(1, width + 1, vocabulary, generator=dice)
    context = Context([[1, 2, 3]], Prompt(3, None, torch.arange(3)[None]))

    def law(sampled: bool) -> LawMaker:
        noise = SharedNoise([torch.Generator().manual_seed(1)], 1, vocabulary) if sampled else None
        return LawMaker([], sampled, CPU, noise=noise)

    def check(sampled: bool, draft: list[int]) -> list[int]:
        offered = Proposal([draft], None, [[1] * len(draft)])
        return judge(law(sampled), context, offered, logits, [True], "auto", 0).tokens[0]

    def right(sampled: bool) -> list[int]:
        draft: list[int] = []
        while len(draft) < width:
            draft = check(sampled, [*draft, *[0] * (width - len(draft))])[:width]
        return draft

    def draw() -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(width + 1):
            by_torch(1, vocabulary, generator)

    greedy, drawn = right(False), right(True)
    runs: dict[str, Callable[[], object]] = {
        "greedy": lambda: check(False, greedy), "sampled": lambda: check(True, drawn), "draw": draw,
    }  # fmt: skip
    return _medians(runs, repeats, 3)


def answer_times(
    target: Any, assistants: Sequence[Any], prompt: dict[str, torch.Tensor], new_tokens: int, repeats: int
) -> dict[str, float]:
    """Medians of interleaved answers to one prompt, in seconds.

    Args:
        target: the model; assistants: the levels below it; prompt: ids and mask `[1, L]`; new_tokens: at most.
        repeats: answers of each kind.

    Returns:
        "greedy", "sampled" and "draw", the last for as many draws as plain generate() makes for the answer; "tokens".
        Nothing where the cold answer is another text, or took another number of passes: two ids were equally likely,
        as happens in bfloat16.
    """
    seen = {}

    def answer(name: str, **options: Any) -> None:
        found = generate(
            target, **prompt, assistant_models=list(assistants), max_new_tokens=new_tokens,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
        seen[name] = (found.sequences[0].tolist(), found.polyspec.levels[0].forward_passes)

    def draw() -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(len(seen["greedy"][0]) - prompt["input_ids"].shape[1]):
            by_torch(1, target.config.get_text_config().vocab_size, generator)

    runs: dict[str, Callable[[], object]] = {
        "greedy": lambda: answer("greedy", do_sample=False),
        "sampled": lambda: answer("sampled", do_sample=True, temperature=COLD, top_k=0, top_p=1.0),
        "draw": draw,
    }
    found = _medians(runs, repeats, 1)
    if seen["greedy"] != seen["sampled"]:
        return {}
    return {**found, "tokens": len(seen["greedy"][0]) - prompt["input_ids"].shape[1]}


def _medians(runs: dict[str, Callable[[], object]], repeats: int, warm: int) -> dict[str, float]:
    """Seconds of each, run in turns; `warm` turns before those that count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + warm):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number >= warm:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _answers(given: argparse.Namespace) -> None:
    from ...cpu.packing import pack
    from ...models.assistants import by_name
    from ...models.by_name import load_model, load_tokenizer
    from ...models.conversation import encode_prompt
    from ...planning.texts import PROMPTS
    from .same_seed import MORE_PROMPTS

    target, tokenizer = load_model(given.model, given.dtype), load_tokenizer(given.model)
    levels = by_name(target, given.assistant or ["int8", "suffix"])
    if given.dtype == "bfloat16":
        pack(target)
    print(f"seconds for an answer of {given.model} in {given.dtype}, medians of {given.answers}")
    prompts = [encode_prompt(tokenizer, text, target.device) for text in (*PROMPTS, *MORE_PROMPTS)]
    found = [answer_times(target, levels, prompt, given.new_tokens, given.answers) for prompt in prompts]
    same = [times for times in found if times]
    if not same:
        raise SystemExit("no cold answer is the greedy one: take float32.")
    whole = {name: sum(times[name] for times in same) for name in same[0]}
    share = whole["sampled"] / (whole["greedy"] + whole["draw"])
    named = ", ".join(f"{name} {whole[name]:.2f}" for name in ("greedy", "sampled", "draw"))
    print(f"  {len(same)} of {len(found)} prompts, {whole['tokens']:.0f} tokens: {named}")
    print(f"  sampled / (greedy + draw) {share:.2f}")


def main(words: Sequence[str] | None = None) -> None:
    """Drafts of several lengths over a vocabulary, and answers of a model."""
    parser = argparse.ArgumentParser("polyspec measure checks", description=__doc__)
    parser.add_argument("--vocabulary", type=arguments.count, default=49_152)
    parser.add_argument("--widths", type=arguments.count, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--repeats", type=arguments.count, default=101)
    parser.add_argument("--model", help="also time whole answers of this one")
    parser.add_argument(
        "--assistant", type=arguments.level, action="append", help="below it, the slowest first; int8 and suffix"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="bfloat16 is packed")
    parser.add_argument("--new-tokens", type=arguments.count, default=64)
    parser.add_argument("--answers", type=arguments.count, default=5)
    given = parser.parse_args(words)
    print(describe())
    print(f"ms for a check over {given.vocabulary} ids, medians of {given.repeats}")
    for width in given.widths:
        found = {name: 1000 * value for name, value in check_times(width, given.vocabulary, given.repeats).items()}
        share = found["sampled"] / (found["greedy"] + found["draw"])
        named = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        print(f"  {width} tokens: {named}; sampled / (greedy + draw) {share:.2f}")
    if given.model:
        _answers(given)
