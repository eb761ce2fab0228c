# SPDX-License-Identifier: Apache-2.0
"""Losslessness: token equality, and a two-sample test that is silent on equal laws and loud on wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import pytest
from scipy import stats

from hf_polyspec.metrics import module_path
from hf_polyspec.metrics.losslessness.losslessness import permutation_test

VOCABULARY, LENGTH = 4, 8
Chooser = Callable[[np.random.Generator, np.ndarray, np.ndarray], int]


@pytest.fixture(scope="module")
def tokens() -> Any:
    return evaluate.load(module_path("losslessness"), keep_in_memory=True)


@pytest.fixture(scope="module")
def samples() -> Any:
    return evaluate.load(module_path("losslessness"), "samples", keep_in_memory=True)


def test_token_equality(tokens: Any) -> None:
    found = tokens.compute(
        predictions=[[1, 2, 3], [1, 9, 3], [1, 2], [1, 2, 3], []],
        references=[[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2], []],
    )
    assert found["first_difference"] == [None, 1, 2, 2, None]
    assert found["first_difference_tokens"] == [None, [9, 2], [None, 3], [3, None], None]
    assert found["num_identical"] == 2
    assert found["identical_rate"] == pytest.approx(2 / 5)
    assert found["agreeing_prefix_rate"] == pytest.approx((3 + 1 + 2 + 2) / 11)


def draw(rng: np.random.Generator, law: np.ndarray) -> int:
    return min(int(np.searchsorted(law.cumsum(), rng.random(), side="right")), len(law) - 1)


def plain(rng: np.random.Generator, p: np.ndarray, q: np.ndarray) -> int:
    return draw(rng, p)


def speculative(rng: np.random.Generator, p: np.ndarray, q: np.ndarray) -> int:
    """Leviathan et al. 2023: keep a draft with probability min(1, p/q), else draw from the residual."""
    drawn = draw(rng, q)
    if rng.random() < p[drawn] / q[drawn]:
        return drawn
    residual = np.maximum(p - q, 0)
    return draw(rng, residual / residual.sum())


def recovers_from_p(rng: np.random.Generator, p: np.ndarray, q: np.ndarray) -> int:
    """Wrong: a rejected draft is replaced from p instead of the residual."""
    drawn = draw(rng, q)
    return drawn if rng.random() < p[drawn] / q[drawn] else plain(rng, p, q)


def lenient(rng: np.random.Generator, p: np.ndarray, q: np.ndarray) -> int:
    """Wrong: accepts twice as readily as the law allows."""
    drawn = draw(rng, q)
    return drawn if rng.random() < 2 * p[drawn] / q[drawn] else plain(rng, p, q)


def sequences(rng: np.random.Generator, choose: Chooser, count: int, seed: int = 0) -> list[list[int]]:
    """Sample a Markov chain whose next token is chosen from target law p and draft law q."""
    laws = np.random.default_rng(seed)
    target = laws.dirichlet(np.full(VOCABULARY, 0.7), VOCABULARY)  # [V, V]
    draft = 0.2 * target + 0.8 * laws.dirichlet(np.full(VOCABULARY, 0.7), VOCABULARY)
    out = []
    for _ in range(count):
        row = [0]
        for _ in range(LENGTH):
            row.append(choose(rng, target[row[-1]], draft[row[-1]]))
        out.append(row[1:])
    return out


def alarms(choose: Chooser, trials: int, count: int, seed: int) -> int:
    """Trials in which `choose` is told from plain sampling at a false-alarm rate of 5 %."""
    rng = np.random.default_rng(seed)
    raised = 0
    for trial in range(trials):
        ours = [sequences(rng, choose, count, prompt) for prompt in range(2)]
        theirs = [sequences(rng, plain, count + 5, prompt) for prompt in range(2)]
        raised += permutation_test(ours, theirs, 99, trial)[0] <= 0.05
    return raised


def test_equal_laws_keep_the_false_alarm_rate() -> None:
    """Exact speculative against plain sampling: 120 trials at 5 %, seed 0; the bound errs with 1e-4."""
    assert alarms(speculative, 120, 15, seed=0) <= stats.binom.ppf(1 - 1e-4, 120, 0.05)


@pytest.mark.parametrize("wrong", [recovers_from_p, lenient])
def test_wrong_rules_raise_the_alarm(wrong: Chooser) -> None:
    """At 300 sequences a prompt each of 6 trials must see the wrong rule; seed 1."""
    assert alarms(wrong, 6, 300, seed=1) == 6


def test_joint_law_is_compared_not_only_marginals(samples: Any) -> None:
    """Uniform tokens on both sides, but one side repeats its first token: only pairs can tell; seed 2."""
    rng = np.random.default_rng(2)
    independent = rng.integers(4, size=(200, 2))
    repeated = np.repeat(rng.integers(4, size=(200, 1)), 2, axis=1)
    found = samples.compute(predictions=[repeated.tolist()], references=[independent.tolist()])
    assert found["differs"]
    assert found["p_value"] == pytest.approx(1 / 1000)
    assert found["family_z"]["pair_at_position"] > 10


def test_lengths_are_compared(samples: Any) -> None:
    """Sides that stop early with 10 % and 60 %; seed 3."""
    rng = np.random.default_rng(3)
    sides = [[[7] * (2 if rng.random() < early else 5) for _ in range(100)] for early in (0.1, 0.6)]
    assert samples.compute(predictions=[sides[0]], references=[sides[1]])["differs"]


def test_one_sample_a_prompt_still_keeps_the_rate_and_sees_a_bias() -> None:
    """40 prompts with one sequence a side, as a bench at temperature 1 leaves them; seed 4, rate 5 %."""
    rng = np.random.default_rng(4)
    laws = [rng.dirichlet(np.ones(12)) for _ in range(40)]
    favoured = [0.5 * law + 0.5 * np.eye(12)[0] for law in laws]

    def sampled(sources: list[np.ndarray]) -> list[list[list[int]]]:
        return [[rng.choice(12, size=10, p=law).tolist()] for law in sources]

    false = sum(permutation_test(sampled(laws), sampled(laws), 99, k)[0] <= 0.05 for k in range(80))
    assert false <= stats.binom.ppf(1 - 1e-4, 80, 0.05)
    assert all(permutation_test(sampled(favoured), sampled(laws), 99, k)[0] <= 0.05 for k in range(5))


def test_dependent_tokens_fool_a_pooled_chi_square_but_not_this_test() -> None:
    """Sequences that repeat one token: 200 trials under equal laws, rate 5 %, seed 5."""
    rng = np.random.default_rng(5)
    ours = naive = 0
    for trial in range(200):
        sides = [np.repeat(rng.integers(3, size=(20, 1)), 10, axis=1) for _ in range(2)]
        counts = np.stack([np.bincount(side.ravel(), minlength=3) for side in sides])
        naive += stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue <= 0.05
        ours += permutation_test([sides[0].tolist()], [sides[1].tolist()], 99, trial)[0] <= 0.05
    most = stats.binom.ppf(1 - 1e-4, 200, 0.05)
    assert ours <= most
    assert naive > most


def test_identical_samples_are_never_told_apart(samples: Any) -> None:
    found = samples.compute(predictions=[[[1], [2]]], references=[[[1], [2]]], n_permutations=99)
    assert found["p_value"] == 1.0
    assert not found["differs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must lie"),
        ({"n_permutations": 50}, "50 permutations cannot reach alpha=0.01; use at least 99"),
    ],
)
def test_refused_options(samples: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samples.compute(predictions=[[[1]]], references=[[[1]]], **options)


def test_refused_inputs(samples: Any) -> None:
    with pytest.raises(ValueError, match="at least one sampled sequence for every prompt"):
        samples.compute(predictions=[[[1]], []], references=[[[1]], [[1]]])
    with pytest.raises(ValueError, match="configurations 'default' and 'samples', not 'other'"):
        evaluate.load(module_path("losslessness"), "other")
