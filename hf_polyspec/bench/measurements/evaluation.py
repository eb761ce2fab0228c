# SPDX-License-Identifier: Apache-2.0
"""What a chain brings in an evaluation harness: `polyspec measure evaluation`.

One task that generates is run, in turns, by the harness's own transformers model and by ours with chains below it: the
model as it is loaded, and the same packed. Answers are compared sample by sample with those of the harness's own model
in the same form. Seconds are those of a whole evaluation by a model that is there; the first one is told apart, since
kernels are compiled, copies made and "auto" measures then.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from ...planning.texts import PROMPTS
from ...quantization import pack
from ...quantization.modules import sharing_copy
from . import arguments
from .evaluation_harnesses import HARNESSES, Answers, Harness
from .evaluation_ties import Judge, Parting
from .same_seed import MORE_PROMPTS
from .ways import finish, in_turns, parser_of, quotient, table_of, targets_of

CHAINS = ("int8,suffix", "auto")
PLAIN = "alone"
FORMS = ("as loaded", "packed")
Way = tuple[str, str]
"""A form of the model, and the names of a chain or `PLAIN`."""


@dataclass(frozen=True)
class Rate:
    """One way of evaluating.

    Attributes:
        form, chain: of the way; batch: texts at a time; samples: of the task.
        alike: samples whose answer is that of the harness's own model in this form; its own answers are compared with
            those at the first number of texts at a time.
        ties: samples whose answer leaves that one at a tie.
        tokens: that a chain generated in one evaluation; passes: of the target, rows counted one by one (0: unknown).
        seconds: of an evaluation, the median; first: of the first one.
        ratio: of these seconds to those of the harness's own model as it is loaded, the median of the turns.
        packed_ratio: to those of the harness's own model packed.
        first_ratio: the first evaluation's seconds to those of the harness's own model as it is loaded.
    """

    form: str
    chain: str
    batch: int
    samples: int
    alike: int
    ties: int
    tokens: int
    passes: int
    seconds: float
    first: float
    ratio: float
    packed_ratio: float
    first_ratio: float


def ways_of(chains: Sequence[str]) -> list[Way]:
    """Both forms alone and with every chain; "auto" packs by itself, so it is given the model as it is loaded only."""
    return [
        (form, chain) for chain in (PLAIN, *chains) for form in FORMS if (form, chain) != ("packed", "auto")
    ]  # fmt: skip


def measure(
    target: Any,
    tokenizer: Any,
    chains: Sequence[str],
    harness: Harness,
    *,
    rounds: int,
    batches: Sequence[int] = (1,),
) -> tuple[list[Rate], list[Parting]]:
    """Evaluate one model in every way, in turns, and see where answers that differ part.

    Args:
        target: as it was loaded; tokenizer: of it; chains: names with commas between.
        harness: that has the task.
        rounds: of which the median counts; batches: texts at a time, one number after the other.
    """
    judge = Judge(target, tokenizer)
    rates: list[Rate] = []
    partings: list[Parting] = []
    own: dict[str, Answers] = {}
    for batch in batches:
        answers, found, first = _turns(target, tokenizer, chains, harness, rounds, batch)
        for form in FORMS:
            own.setdefault(form, answers[form, PLAIN])
        for way, seconds in found.items():
            form, chain = way
            wanted = own[form] if chain == PLAIN else answers[form, PLAIN]
            parted = judge.partings(way, batch, answers[way], wanted)
            partings += parted
            rates.append(
                Rate(
                    *way, batch, len(answers[way].texts),
                    sum(one == other for one, other in zip(answers[way].texts, wanted.texts, strict=True)),
                    sum(one.tie for one in parted),
                    answers[way].tokens, answers[way].passes, statistics.median(seconds), first[way],
                    quotient(found, ("as loaded", PLAIN), way), quotient(found, ("packed", PLAIN), way),
                    first[way] / first["as loaded", PLAIN],
                )
            )  # fmt: skip
    return rates, partings


def _turns(
    target: Any, tokenizer: Any, chains: Sequence[str], harness: Harness, rounds: int, batch: int
) -> tuple[dict[Way, Answers], dict[Way, list[float]], dict[Way, float]]:
    """Of every way the answers, the seconds of each turn that counts, and those of the first."""
    ways = ways_of(chains)
    forms = {"as loaded": target, "packed": pack(sharing_copy(target))}
    models = {
        (form, chain): harness.model(
            sharing_copy(forms[form]) if form == "as loaded" else forms[form],
            tokenizer,
            None if chain == PLAIN else chain,
            batch,
        )
        for form, chain in ways
    }
    answers: dict[Way, Answers] = {}
    first: dict[Way, float] = {}

    def timed(way: Way, turn: int) -> float:
        began = time.perf_counter()
        answers[way] = harness.evaluate(models[way])
        seconds = time.perf_counter() - began
        if turn < 0:
            first[way] = seconds
        return seconds

    return answers, in_turns(timed, ways, rounds), first


def questions_of(rows: int) -> list[str]:
    """What people may ask a model; there is no right answer, so that scores say nothing."""
    return [*PROMPTS, *MORE_PROMPTS][:rows]


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("evaluation", __doc__, CHAINS, ("bfloat16",))
    parser.add_argument("--harness", choices=HARNESSES, default="lm-eval")
    parser.add_argument("--questions", type=arguments.count, default=12)
    parser.add_argument("--batch-size", type=arguments.count, nargs="+", default=[1])
    given = parser.parse_args(words)
    make, package, extra = HARNESSES[given.harness]
    if find_spec(package) is None:
        raise ImportError(f'polyspec measure evaluation needs {given.harness}: pip install "hf_polyspec[{extra}]".')
    if any(change for _, change in given.form):
        parser.error("--form: a dtype alone; the model is taken as it is and packed.")
    rates: list[Rate] = []
    partings: list[Parting] = []
    with TemporaryDirectory() as folder:
        harness = make(questions_of(given.questions), given.new_tokens, Path(folder))
        for _, target, tokenizer in targets_of(given):
            found = measure(
                target, tokenizer, given.chain, harness, rounds=given.rounds, batches=given.batch_size
            )  # fmt: skip
            rates += found[0]
            partings += found[1]
    console = Console(width=130)
    console.print(_table(given, rates))
    for one in partings:
        console.print(str(one), highlight=False)
    finish(console, given, rates=rates, partings=partings)


def _table(given: argparse.Namespace, rates: Sequence[Rate]) -> Any:
    headings = (
        "chain",
        "batch",
        "alike",
        "ties",
        "passes/token",
        "seconds",
        "by alone",
        "by packed",
        "first",
        "by alone",
    )
    table = table_of(f"{given.harness}, {given.questions} samples", headings)
    for rate in rates:
        table.add_row(
            rate.form, rate.chain, str(rate.batch), f"{rate.alike} of {rate.samples}", str(rate.ties),
            f"{rate.passes / rate.tokens:.2f}" if rate.tokens else "1",
            f"{rate.seconds:.2f}", f"{rate.ratio:.2f}", f"{rate.packed_ratio:.2f}",
            f"{rate.first:.2f}", f"{rate.first_ratio:.2f}",
        )  # fmt: skip
    return table
