# SPDX-License-Identifier: Apache-2.0
"""The paper's own measurements beside what its theory, as printed and as corrected, says about them.

``polyspec measure paper-tables`` prints the tables of docs/theory.md. Speed-ups and lengths are
the paper's (arXiv 2510.26527, Tables 1 to 3), everything else is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .costs import exact_time_per_token, implied_beta, lemma_time_per_token
from .insertion import Insertion, condition_c1, critical_length_before, lemma_change_above_drafter, smallest_beta_for_c2
from .lengths import agreement_for_length, expected_length, length_variance, printed_variance
from .rejections import acceptance_probability, emitted_law, pareto_front, rejection_probability, total_variation
from .rounds import best_block, chain_rounds


@dataclass(frozen=True)
class PaperInsertion:
    """A row of the paper's Table 1.

    Attributes:
        name: what is inserted, and where.
        insertion: times in milliseconds, and lengths.
        printed_right: right-hand side of C1 as the paper prints it.
        speed_up_before: measured, against plain decoding, without the new model.
        speed_up_after: measured, with it.
    """

    name: str
    insertion: Insertion
    printed_right: float
    speed_up_before: float
    speed_up_after: float


@dataclass(frozen=True)
class PaperSpeed:
    """A column of the paper's Table 2 or 3, over all tasks.

    Attributes:
        name: the target.
        chain_speed_up: three models, against plain decoding.
        chain_length: their tokens per target pass.
        eagle_speed_up: EAGLE-2 alone (EAGLE or EAGLE-2 in Table 3).
        eagle_length: its tokens per target pass.
    """

    name: str
    chain_speed_up: float
    chain_length: float
    eagle_speed_up: float
    eagle_length: float


TABLE_1 = (
    PaperInsertion(
        "Vicuna-1B between Vicuna-7B and EAGLE-2",
        Insertion(22, 17.61, 4, length_before=4.34, length_above=3.83, length_new=3.77),
        printed_right=0.117,
        speed_up_before=2.61,
        speed_up_after=1.08,
    ),
    PaperInsertion(
        "W4A16 Vicuna-7B between Vicuna-7B and EAGLE-2",
        Insertion(22, 7, 4, length_before=4.34, length_above=6.26, length_new=4.67),
        printed_right=0.330,
        speed_up_before=2.61,
        speed_up_after=3.48,
    ),
    PaperInsertion(
        "FLAN-T5 base between XXL and small (CS-Drafting)",
        Insertion(47.52, 19.16, 12.42, length_before=2.28, length_above=3.50, length_new=3.02),
        printed_right=0.461,
        speed_up_before=3.19,
        speed_up_after=3.88,
    ),
)
COMPLIANT = TABLE_1[1]

TABLES_2_AND_3 = (
    PaperSpeed("Vicuna-7B", 3.48, 9.88, 2.61, 4.34),
    PaperSpeed("LLaMA3-8B-Instruct", 3.31, 9.44, 2.44, 3.82),
    PaperSpeed("LLaMA2-Chat-7B", 3.66, 9.84, 2.70, 4.30),
    PaperSpeed("Qwen2-7B-Instruct", 3.28, 9.32, 1.94, 3.51),
    PaperSpeed("Vicuna-13B", 2.69, 8.62, 2.30, 4.42),
    PaperSpeed("LLaMA2-Chat-70B", 2.92, 7.48, 2.46, 4.08),
)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _times(speed_up: float) -> str:
    return f"{speed_up:.2f}x"


def beta_of(row: PaperInsertion) -> float:
    """The beta at which Lemma 3.1 gives a row's measured speed-up before the insertion.

    Args:
        row: a row of Table 1.

    Returns:
        beta; negative if no drafter explains the measurement.
    """
    numbers = row.insertion
    return implied_beta(numbers.time_above, numbers.time_below, numbers.length_before, row.speed_up_before)


def predicted_speed_ups(row: PaperInsertion, beta: float) -> tuple[float, float]:
    """Speed-ups before and after the insertion by Lemma 3.1 as printed.

    Args:
        row: a row of Table 1.
        beta: drafter passes per pass of the model above it.

    Returns:
        (before, after), against plain decoding at the target's pass time.
    """
    numbers = row.insertion
    before = lemma_time_per_token((numbers.time_above, numbers.time_below), (numbers.length_before,), beta)
    after = before + lemma_change_above_drafter(numbers, beta)
    return numbers.time_above / before, numbers.time_above / after


def insertion_table() -> str:
    """Theorem 3.2 on the paper's Table 1: condition as printed, computed, and what was measured.

    Returns:
        A markdown table.
    """
    rows = []
    for row in TABLE_1:
        c1, beta = condition_c1(row.insertion), beta_of(row)
        c2_beta = smallest_beta_for_c2(row.insertion)
        before, after = predicted_speed_ups(row, max(beta, 0.0))
        most = "" if beta >= 0 else "at most "
        rows.append(
            (
                row.name,
                f"{row.printed_right:.3f}",
                f"{c1.left:.3f} < {c1.right:.3f}: {'holds' if c1.holds else 'fails'}",
                "never" if math.isinf(c2_beta) else f"beta > {c2_beta:.1f}",
                f"{beta:.2f}" if beta >= 0 else f"{beta:.2f}: none",
                f"{most}{_times(before)} -> {most}{_times(after)}",
                f"{_times(row.speed_up_before)} -> {_times(row.speed_up_after)}",
            )
        )
    header = ["inserted", "right of C1 as printed", "C1 computed", "C2 needs"]
    header += ["beta implied", "Lemma 3.1", "measured"]
    return _table(header, rows)


def middle_table() -> str:
    """What each form says about the W4A16 middle of the paper, with either length the paper gives for it.

    Returns:
        A markdown table.
    """
    numbers, beta = COMPLIANT.insertion, beta_of(COMPLIANT)
    times = (numbers.time_above, numbers.time_new, numbers.time_below)
    rows = []
    for source, length in (("Table 1", numbers.length_above), ("Table 2", TABLES_2_AND_3[0].chain_length)):
        cells = [f"{length:.2f} ({source})"]
        cells.append(_times(times[0] / lemma_time_per_token(times, (length, numbers.length_new), beta)))
        for handed in (length - 1.0, 12.0, 16.0):
            exact = exact_time_per_token(times, (length, numbers.length_new), (handed,), beta)
            cells.append(_times(times[0] / exact))
        rows.append((*cells, _times(COMPLIANT.speed_up_after)))
    header = ("L_1", "Lemma 3.1", "exact, nothing wasted", "exact, E[B] = 12", "exact, E[B] = 16", "measured")
    return _table(header, rows)


def speed_table() -> str:
    """Speed-ups of Tables 2 and 3, the cost of a target round they imply, and the agreement they need.

    Returns:
        A markdown table.
    """
    rows = []
    for speed in TABLES_2_AND_3:
        needed = [f"{agreement_for_length(speed.chain_length, block):.3f}" for block in (10, 12, 16)]
        rows.append(
            (
                speed.name,
                f"{_times(speed.eagle_speed_up)} / {speed.eagle_length:.2f}",
                f"{speed.eagle_length / speed.eagle_speed_up:.2f}",
                f"{_times(speed.chain_speed_up)} / {speed.chain_length:.2f}",
                f"{speed.chain_length / speed.chain_speed_up:.2f}",
                *needed,
            )
        )
    header = ("target", "EAGLE", "round", "three models", "round", "B = 10", "B = 12", "B = 16")
    return _table(header, rows)


def waste_table() -> str:
    """Lemma 3.1 with the lengths one measures, beside the exact time, for a chain of independent tokens.

    Times (22, 7, 1), draft length 5, agreement 0.75 between drafter and middle, threshold 10.

    Returns:
        A markdown table.
    """
    times = (22.0, 7.0, 1.0)
    rows = []
    for agreement in (0.70, 0.85, 0.90, 0.95, 0.98):
        middle, target = chain_rounds(times, (agreement, 0.75), (10, 5))
        lemma = lemma_time_per_token(times, (target.length, middle.length), 5)
        exact = target.time_per_token
        rows.append(
            (
                f"{agreement:.2f}",
                f"{target.length:.2f}",
                f"{lemma:.2f} ms",
                f"{exact:.2f} ms",
                f"{100 * (lemma / exact - 1):+.0f} %",
            )
        )
    header = ("agreement of target and middle", "L_1", "Lemma 3.1", "exact", "error of the lemma")
    return _table(header, rows)


def variance_table() -> str:
    """Theorem 3.3 as printed beside the corrected moments.

    Returns:
        A markdown table.
    """
    rows = [
        (
            f"{accept:.2f}",
            str(n),
            f"{expected_length(accept, n - 1):.2f}",
            f"{length_variance(accept, n - 1):.2f}",
            f"{printed_variance(accept, n):.2f}",
        )
        for accept, n in (
            (0.5, 1), (0.5, 2), (0.5, 8), (0.75, 8), (0.86, 8), (0.9, 10), (0.95, 8), (0.99, 8)
        )
    ]  # fmt: skip
    return _table(("accept rate", "n", "mean", "variance", "variance as printed"), rows)


def block_table() -> str:
    """Best block for the paper's times: T_1 = 22 ms and 4.67 tokens per middle round.

    Returns:
        A markdown table.
    """
    rows = []
    for agreement in (0.80, 0.90, 0.95, 0.98):
        cells = [f"{agreement:.2f}"]
        for round_cost in (12.0, 21.6):
            best = best_block(22.0, round_cost / 4.67, agreement)
            cells.append(f"{best.block} ({_times(22.0 / best.time_per_token)})")
        rows.append(cells)
    return _table(("agreement", "middle round 12 ms", "middle round 21.6 ms"), rows)


def pareto_table() -> str:
    """The bias dial on one position: p = (0.5, 0.3, 0.2) and q = (0.2, 0.3, 0.5), whose TV is 0.3.

    Returns:
        A markdown table.
    """
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    rows = []
    for point in pareto_front(p, q, (0.0, 0.25, 0.5, 0.75, 1.0)):
        accept = acceptance_probability(p, q, point.bias_budget)
        rejected = rejection_probability(q, accept)
        # Drawing the recovered token from p itself is the tempting simplification, biased even at lambda = 0.
        naive = float(total_variation(accept * q + rejected * p, p))
        middle = float(total_variation(emitted_law(p, q, accept), q))
        rows.append(
            (
                f"{point.bias_budget:.2f}",
                f"{point.rejection:.3f}",
                f"{point.bias:.3f}",
                f"{point.rejection + point.bias:.3f}",
                f"{naive:.3f}",
                f"{middle:.3f}",
            )
        )
    header = ("bias budget", "P(reject)", "bias", "sum", "bias if recovered from p", "TV(q_eff, q)")
    return _table(header, rows)


def sensitivity() -> str:
    """How near the paper's compliant case is to the edge of C1.

    Returns:
        One sentence.
    """
    numbers = COMPLIANT.insertion
    edge = critical_length_before(numbers)
    return (
        f"In the compliant case C1 turns false at L_i = {edge:.3f}, "
        f"{100 * (edge / numbers.length_before - 1):.1f} % above the {numbers.length_before} measured."
    )


def paper_tables() -> dict[str, str]:
    """All tables of docs/theory.md by name, in the order of the page.

    Returns:
        Markdown by name.
    """
    return {
        "Lemma 3.1 and waste": waste_table(),
        "Insertion": insertion_table(),
        "Sensitivity": sensitivity(),
        "The 4-bit middle": middle_table(),
        "Measured speed-ups": speed_table(),
        "Accepted length": variance_table(),
        "Best block": block_table(),
        "The bias dial": pareto_table(),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print every table under its name; there are no options."""
    if words:
        raise ValueError(f"paper-tables takes no options, got {' '.join(words)}.")
    for name, text in paper_tables().items():
        print(f"{name}\n\n{text}\n")
