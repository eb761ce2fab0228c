# SPDX-License-Identifier: Apache-2.0
"""The theory of a speculative chain, equation by equation: one door to the six files that hold it.

=====================  ==============================================================================
file                   what it answers
=====================  ==============================================================================
``lengths``            how many tokens a pass emits: law, mean, variance; Theorem 3.3 as printed
``coupling``           how often levels that share one noise agree
``costs``              what a token costs: Lemma 3.1 as printed, its exact form, the chain recursion
``rounds``             rounds with their overshoot, the best block sizes
``insertion``          whether another model pays: conditions C1 and C2 of Theorem 3.2 as printed, and
                       the exact test
``rejections``         how often a verifier says no: sums of total variation, the linear Pareto front of
                       lossy acceptance, the lenient middle
=====================  ==============================================================================

Words: ``agreement`` is the probability that a verifier accepts one proposed token, under sampling that of the rule in
use (``coupled_acceptance``, or ``sum(min(p, q))``); ``proposed`` is how many tokens it is offered; ``emitted`` is how
many it yields, its own recovered or bonus token included. Times may be in any unit as long as it is the same one
everywhere. "The paper" is *Polybasic Speculative Decoding Through a Theoretical Perspective* (ICML 2025, arXiv
2510.26527).
"""

from __future__ import annotations

from .costs import (
    chain_cost,
    chain_cost_from_lengths,
    committed_lengths,
    exact_time_per_token,
    implied_beta,
    lemma_time_per_token,
)
from .coupling import coupled_acceptance, coupled_agreement, noise_behind
from .insertion import (
    Inequality,
    Insertion,
    condition_c1,
    condition_c2,
    critical_length_before,
    exact_change,
    lemma_change_above_drafter,
    lemma_change_inside,
    smallest_beta_for_c2,
)
from .lengths import (
    agreement_for_length,
    expected_length,
    law_mean,
    law_variance,
    least_stable_agreement,
    length_law,
    length_law_by_position,
    length_variance,
    printed_mean_length,
    printed_second_moment,
    printed_variance,
    second_moment,
)
from .rejections import (
    ParetoPoint,
    acceptance_probability,
    accumulated_bias,
    agreement,
    emitted_law,
    expected_rejections,
    multi_draft_rejections,
    pareto_front,
    rejection_law,
    rejection_probability,
    rejection_z_score,
    smallest_bias,
    total_variation,
)
from .rounds import (
    BestBlock,
    Round,
    best_block,
    best_block_measured,
    best_chain_blocks,
    block_law,
    chain_rounds,
    drafted_round,
    verified_round,
)

__all__ = [
    "BestBlock",
    "Inequality",
    "Insertion",
    "ParetoPoint",
    "Round",
    "acceptance_probability",
    "accumulated_bias",
    "agreement",
    "agreement_for_length",
    "best_block",
    "best_block_measured",
    "best_chain_blocks",
    "block_law",
    "chain_cost",
    "chain_cost_from_lengths",
    "chain_rounds",
    "committed_lengths",
    "condition_c1",
    "condition_c2",
    "coupled_acceptance",
    "coupled_agreement",
    "critical_length_before",
    "drafted_round",
    "emitted_law",
    "exact_change",
    "exact_time_per_token",
    "expected_length",
    "expected_rejections",
    "implied_beta",
    "law_mean",
    "law_variance",
    "least_stable_agreement",
    "lemma_change_above_drafter",
    "lemma_change_inside",
    "lemma_time_per_token",
    "length_law",
    "length_law_by_position",
    "length_variance",
    "multi_draft_rejections",
    "noise_behind",
    "pareto_front",
    "printed_mean_length",
    "printed_second_moment",
    "printed_variance",
    "rejection_law",
    "rejection_probability",
    "rejection_z_score",
    "second_moment",
    "smallest_beta_for_c2",
    "smallest_bias",
    "total_variation",
    "verified_round",
]
