# SPDX-License-Identifier: Apache-2.0
"""The quality metrics, through `evaluate` where its module can be had and otherwise by what it wraps.

`evaluate` fetches the modules `sacrebleu`, `rouge`, `squad` and `exact_match` from the Hub or its cache, so
without network it may have none of them. Each scorer says where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .answers import contains_answer, exact_match, final_number, marked_number, token_f1
from .comparison import Array, Combine, column

Measure = Callable[[str, Sequence[str]], list[float]]

BLEU_ORDERS = 4
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


class MetricUnavailableError(RuntimeError):
    """A metric can be had neither through `evaluate` nor from a package; the message says what to do."""


@dataclass(frozen=True)
class Scorer:
    """One family of metrics over (output, references).

    Attributes:
        name: of the family.
        source: a sentence that says what computes it.
        rows: for each reported metric, the map from summed statistics to its score.
        measure: sufficient statistics `[S]` of one output.
        usable: whether references can be scored against at all.
    """

    name: str
    source: str
    rows: Mapping[str, Combine]
    measure: Measure
    usable: Callable[[Sequence[str]], bool] = bool


def find_module(name: str, folder: Path | None) -> tuple[Any | None, str]:
    """Load a community `evaluate` module from a local folder, the Hub, or the cache.

    Args:
        name: of the module, such as `"rouge"`.
        folder: where `<name>/<name>.py` may lie, tried first.

    Returns:
        The module and where it came from, or None and why it cannot be had.
    """
    try:
        import evaluate
    except ImportError:
        return None, "the package evaluate is not installed"
    local = None if folder is None else folder / name / f"{name}.py"
    try:
        if local is not None and local.is_file():
            return evaluate.load(str(local), keep_in_memory=True), f"evaluate's module {name} ({folder})"
        return evaluate.load(name, keep_in_memory=True), f"evaluate's module {name}"
    except ImportError as error:
        return None, f"evaluate's module {name} needs a package that is not installed ({error})"
    except (OSError, ValueError):
        return None, f"evaluate's module {name} cannot be had offline (no network, not in its cache)"


def bleu(folder: Path | None = None) -> Scorer:
    """Corpus BLEU (Papineni et al. 2002) with sacrebleu's tokenisation.

    Statistics: matches and totals of the four n-gram orders, output length, reference length.

    Args:
        folder: local copies of `evaluate`'s modules, if any.

    Returns:
        The scorer.

    Raises:
        MetricUnavailableError: when sacrebleu is not installed; the corpus score needs it in any case.
    """
    try:
        import sacrebleu
    except ImportError:
        raise MetricUnavailableError("BLEU needs the package sacrebleu: pip install sacrebleu.") from None

    def combine(totals: Array, n: int) -> Array:
        return np.array(
            [
                sacrebleu.BLEU.compute_bleu(
                    correct=row[:BLEU_ORDERS],
                    total=row[BLEU_ORDERS : 2 * BLEU_ORDERS],
                    sys_len=round(row[-2]),
                    ref_len=round(row[-1]),
                    smooth_method="exp",
                ).score
                for row in totals.round(6).tolist()  # sums of swaps carry rounding errors
            ]
        )

    def by_module(module: Any, output: str, references: Sequence[str]) -> list[float]:
        found = module.compute(predictions=[output], references=[list(references)])
        return [*map(float, (*found["counts"], *found["totals"], found["sys_len"], found["ref_len"]))]

    def by_package(output: str, references: Sequence[str]) -> list[float]:
        found = sacrebleu.sentence_bleu(output, list(references), use_effective_order=True)
        return [*map(float, (*found.counts, *found.totals, found.sys_len, found.ref_len))]

    module, source = find_module("sacrebleu", folder)
    if module is None:
        source = f"{source}; computed with the package sacrebleu {version('sacrebleu')} itself"
    measure: Measure = by_package if module is None else partial(by_module, module)
    return Scorer("BLEU", source, {"BLEU": combine}, measure)


def rouge(folder: Path | None = None) -> Scorer:
    """ROUGE-1, ROUGE-2 and ROUGE-L F-measures with stemming (Lin 2004), in percent.

    Args:
        folder: local copies of `evaluate`'s modules, if any.

    Returns:
        The scorer.

    Raises:
        MetricUnavailableError: when neither the module nor rouge_score can be had.
    """
    rows = {f"ROUGE-{kind[5:]}": column(i, 100.0) for i, kind in enumerate(ROUGE_TYPES)}
    module, source = find_module("rouge", folder)
    if module is not None:

        def by_module(output: str, references: Sequence[str]) -> list[float]:
            found = module.compute(
                predictions=[output],
                references=[list(references)],
                rouge_types=list(ROUGE_TYPES),
                use_stemmer=True,
                use_aggregator=False,
            )
            return [float(found[kind][0]) for kind in ROUGE_TYPES]

        return Scorer("ROUGE", source, rows, by_module)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MetricUnavailableError(
            f"ROUGE: {source}, and the package it wraps is missing: pip install rouge_score."
        ) from None
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)

    def by_package(output: str, references: Sequence[str]) -> list[float]:
        found = scorer.score_multi(list(references), output)
        return [float(found[kind].fmeasure) for kind in ROUGE_TYPES]

    source = f"{source}; computed with the package rouge_score {version('rouge_score')} itself"
    return Scorer("ROUGE", source, rows, by_package)


def question_answering(folder: Path | None = None) -> Scorer:
    """Exact match and F1 by SQuAD's rules, and whether the answer occurs in the output, in percent.

    Args:
        folder: local copies of `evaluate`'s modules, if any.

    Returns:
        The scorer.
    """
    rows = {"F1": column(1, 100.0), "exact match": column(0, 100.0), "contains answer": column(2, 100.0)}
    module, source = find_module("squad", folder)

    def by_module(output: str, references: Sequence[str]) -> list[float]:
        assert module is not None
        answers = {"text": list(references), "answer_start": [0] * len(references)}
        found = module.compute(
            predictions=[{"id": "0", "prediction_text": output}], references=[{"id": "0", "answers": answers}]
        )
        scores = [float(found["exact_match"]) / 100, float(found["f1"]) / 100]
        return [*scores, contains_answer(output, references)]

    def by_rules(output: str, references: Sequence[str]) -> list[float]:
        return [
            exact_match(output, references),
            token_f1(output, references),
            contains_answer(output, references),
        ]

    if module is None:
        return Scorer("QA", f"{source}; computed by SQuAD's published rules here", rows, by_rules)
    return Scorer("QA", f"{source} (contains answer: computed here)", rows, by_module)


def grade_school_math(folder: Path | None = None) -> Scorer:
    """Exact match of GSM8K's final number, in percent: as marked by `####`, and read leniently.

    Models that were not shown the format seldom write `####`; the lenient reading falls back on the last
    number of the text.

    Args:
        folder: local copies of `evaluate`'s modules, if any.

    Returns:
        The scorer.
    """
    rows = {"exact match (final number)": column(1, 100.0), "exact match (####)": column(0, 100.0)}
    module, source = find_module("exact_match", folder)

    def equal(answer: str | None, wanted: str) -> float:
        if module is None or answer is None:
            return float(answer == wanted)
        return float(module.compute(predictions=[answer], references=[wanted])["exact_match"])

    def measure(output: str, references: Sequence[str]) -> list[float]:
        wanted = [number for text in references if (number := final_number(text)) is not None]
        found = (marked_number(output), final_number(output))
        return [max(equal(answer, number) for number in wanted) for answer in found]

    def usable(references: Sequence[str]) -> bool:
        return any(final_number(text) is not None for text in references)

    if module is None:
        source = f"{source}; the extracted numbers are compared here"
    return Scorer("GSM8K", source, rows, measure, usable)


SCORERS: dict[str, Callable[[Path | None], Scorer]] = {
    "translation": bleu,
    "summarization": rouge,
    "qa": question_answering,
    "rag": question_answering,
    "math_reasoning": grade_school_math,
}
