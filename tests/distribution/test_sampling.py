# SPDX-License-Identifier: Apache-2.0
"""Sampling through the real door: thousands of draws of tiny transformers models against the exact distribution.

Seeds are fixed, so a run either always passes or always fails. The thresholds were set beforehand: a correct chain
fails a chi-square test here with probability 1e-4, a z-test with probability 6e-7.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from exact_laws import exact_law, p_value
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import hf_polyspec
from hf_polyspec.exactness import judgement
from hf_polyspec.exactness.verification import Verdict

VOCABULARY, LENGTH, DRAWS = 12, 3, 4000
PROMPT = torch.tensor([[3, 7, 1, 7]])
OPTIONS: dict[str, Any] = {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.4}
FALSE_ALARM = 1e-4


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def noisy(model: LlamaForCausalLM, scale: float, seed: int) -> LlamaForCausalLM:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def models() -> list[LlamaForCausalLM]:
    target = hf_polyspec.attach(tiny(0))
    return [target, noisy(target, 0.06, 1), noisy(target, 0.15, 2)]


def processors() -> LogitsProcessorList:
    return LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(OPTIONS["repetition_penalty"]),
            TemperatureLogitsWarper(OPTIONS["temperature"]),
            TopKLogitsWarper(OPTIONS["top_k"]),
            TopPLogitsWarper(OPTIONS["top_p"]),
        ]
    )


def chance_of(draws: torch.Tensor, model: LlamaForCausalLM) -> float:
    """That draws of the model's own law, with transformers' own processors, are as far from it as these."""
    return p_value(draws, PROMPT, exact_law(model, PROMPT, LENGTH, VOCABULARY, processors()))


def draw(models: list[LlamaForCausalLM], seed: int, draws: int = DRAWS, **options: Any) -> Any:
    torch.manual_seed(seed)
    return models[0].generate(
        PROMPT,
        assistant_models=models[1:],
        do_sample=True,
        max_new_tokens=LENGTH,
        num_return_sequences=draws,
        polyspec_control="fixed",
        polyspec_block_size=2,
        num_assistant_tokens=2,
        return_dict_in_generate=True,
        **(OPTIONS | options),
    )


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_draws_follow_the_target(models: list[LlamaForCausalLM], levels: int, rule: str) -> None:
    chain = [models[0], *models[3 - levels + 1 :]]
    output = draw(chain, seed=11 + levels, polyspec_verification=rule)
    assert chance_of(output.sequences, models[0]) > FALSE_ALARM
    acceptance = output.polyspec.levels[0].acceptance_rate
    assert 0.2 < acceptance < 0.98, "the test means little unless some proposals are accepted and some rejected"


def test_the_test_sees_a_wrong_residual(models: list[LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def from_p(*args: Any) -> Verdict:
        verdict = genuine(*args)
        p = args[2]
        return Verdict(verdict.accepted, p[torch.arange(p.shape[0]), verdict.accepted])

    genuine = judgement.verify_tokens
    monkeypatch.setattr(judgement, "verify_tokens", from_p)
    output = draw([models[0], models[2]], seed=5, polyspec_verification="token")
    assert chance_of(output.sequences, models[0]) < FALSE_ALARM


def test_the_test_sees_the_law_of_an_assistant(models: list[LlamaForCausalLM]) -> None:
    output = draw(models, seed=6)
    assert chance_of(output.sequences, models[1]) < FALSE_ALARM


@pytest.mark.parametrize("levels", [2, 3])
def test_rejections_equal_the_total_variation(models: list[LlamaForCausalLM], levels: int) -> None:
    """Yin et al. 2024, theorem 1, on every edge of the chain: rejections are Bernoulli with mean TV(p, q)."""
    chain = [models[0], *models[3 - levels + 1 :]]
    output = draw(chain, seed=21, polyspec_verification="token")
    for level in output.polyspec.levels[:-1]:
        judged = level.accepted + level.recovered
        assert judged > 1000
        rejected = level.recovered / judged
        expected = 1 - level.expected_acceptance_rate
        assert abs(rejected - expected) < 5 * (0.25 / judged) ** 0.5


def test_rejections_betray_a_wrong_proposal_law(
    models: list[LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proposer that reports a flatter law than it drew from is rejected at another rate than that law implies."""
    genuine = judgement._verdict

    def misreported(law: Any, proposal: Any, *rest: Any) -> Verdict:
        flatter = None if proposal.q is None else (proposal.q + 0.2) / (proposal.q + 0.2).sum(-1, keepdim=True)
        return genuine(law, type(proposal)(proposal.tokens, flatter, proposal.origins), *rest)

    monkeypatch.setattr(judgement, "_verdict", misreported)
    level = draw([models[0], models[2]], seed=22, polyspec_verification="token").polyspec.levels[0]
    judged = level.accepted + level.recovered
    assert abs(level.recovered / judged - (1 - level.expected_acceptance_rate)) > 5 * (0.25 / judged) ** 0.5


def test_the_same_seed_draws_the_same_text(models: list[LlamaForCausalLM]) -> None:
    first, again, other = (draw(models, seed, draws=50).sequences for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
