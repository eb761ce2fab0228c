# SPDX-License-Identifier: Apache-2.0
"""Both ways between chains and transformers' candidate generators, on tiny models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

import hf_polyspec
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.levels.candidate_generator import CandidateGeneratorDrafter

PROMPT = torch.tensor([[3, 7, 1, 7, 3, 7]])
NO_END = torch.tensor([-1])  # older releases cannot do without an end of text


class Hooked(LlamaForCausalLM):
    """Lets the test choose transformers' candidate generator; the documented way is the same override."""

    assistants: list[Any] | None = None
    made: list[hf_polyspec.PolySpecCandidateGenerator]

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        if self.assistants is None:
            return super()._get_candidate_generator(*args, **kwargs)
        found = hf_polyspec.PolySpecCandidateGenerator(
            self, self.assistants, kwargs["generation_config"], kwargs["logits_processor"]
        )
        self.made.append(found)
        return found


def tiny() -> Hooked:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Hooked(config).eval()
    model.made = []
    return model


def noisy(model: Any, scale: float, seed: int) -> Any:
    other = copy.deepcopy(model)
    other.assistants = None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture
def target() -> Hooked:
    return tiny()


def test_transformers_verifies_a_chain_greedily(target: Hooked) -> None:
    plain = target.generate(PROMPT, max_new_tokens=20, do_sample=False)
    middle, small = noisy(target, 0.02, 1), noisy(target, 0.05, 2)
    target.assistants = [middle, small]
    assisted = target.generate(PROMPT, max_new_tokens=20, do_sample=False, assistant_model=middle)
    assert torch.equal(assisted, plain)
    levels = [target.made[0].chain, target.made[0].chain.below]
    assert [level.index for level in levels] == [1, 2]
    assert levels[0].stats.accepted > 0
    assert levels[0].stats.recovered > 0


def test_transformers_samples_exactly_with_a_chain(target: Hooked) -> None:
    """Two tokens, 600 draws: chi-square against the exact law at a false-alarm rate of 1e-4, seed fixed; the law of
    the chain's own top must fail the same test."""
    middle, small = noisy(target, 0.08, 1), noisy(target, 0.15, 2)
    target.assistants = [middle, small]
    torch.manual_seed(4)
    counts = torch.zeros(12, 12)
    for _ in range(600):
        out = target.generate(PROMPT, max_new_tokens=2, do_sample=True, top_k=0, assistant_model=middle)
        counts[out[0, 6], out[0, 7]] += 1

    def p_value(model: Any) -> float:
        model.assistants = None
        with torch.no_grad():
            first = model(PROMPT).logits[0, -1].softmax(-1)
            second = model(torch.cat([PROMPT.expand(12, -1), torch.arange(12)[:, None]], 1)).logits[:, -1].softmax(-1)
        expected = (first[:, None] * second * 600).flatten().double()
        common = expected >= 5
        seen = torch.cat([counts.flatten()[common], counts.flatten()[~common].sum()[None]])
        wanted = torch.cat([expected[common], expected[~common].sum()[None]])
        return float(stats.chisquare(seen.numpy(), (wanted / wanted.sum() * 600).numpy()).pvalue)

    assert p_value(target) > 1e-4
    assert p_value(middle) < 1e-4


def test_prompt_lookup_as_a_level(target: Hooked) -> None:
    plain = target.generate(PROMPT, max_new_tokens=24, do_sample=False)
    lookup = PromptLookupCandidateGenerator(
        eos_token_id=NO_END, num_output_tokens=4, max_matching_ngram_size=2, max_length=30
    )
    for assistants in ([lookup], [noisy(target, 0.02, 1), lookup]):
        output = hf_polyspec.generate(
            target,
            PROMPT,
            assistant_models=assistants,
            max_new_tokens=24,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences, plain)
        last = output.polyspec.levels[-1]
        assert last.name == "PromptLookupCandidateGenerator"
        assert last.drafted > 0


def assisted(target: Any, small: Any, do_sample: bool) -> AssistedCandidateGenerator:
    config = copy.deepcopy(target.generation_config)
    config.update(do_sample=do_sample, max_length=40, max_new_tokens=None, num_assistant_tokens=3, top_k=0)
    for name, value in (("min_length", 0), ("output_scores", False), ("return_dict_in_generate", False)):
        setattr(config, name, value)
    small.generation_config.num_assistant_tokens = 3
    small.generation_config.assistant_confidence_threshold = 0.0
    small.generation_config.num_assistant_tokens_schedule = "constant"
    return AssistedCandidateGenerator(
        PROMPT, small, config, {"attention_mask": torch.ones_like(PROMPT)}, logits_processor=LogitsProcessorList()
    )


def test_an_assisted_generator_as_a_level_hands_up_the_law_it_drew_from(target: Hooked) -> None:
    small = noisy(target, 0.1, 3)
    drafter = CandidateGeneratorDrafter(assisted(target, small, do_sample=True))
    drafter.begin(1, 1, 12)
    from hf_polyspec.exactness.context import Context, Prompt

    context = Context(PROMPT.tolist(), Prompt(6, None, torch.arange(6)[None]))
    proposal = drafter.propose(context, [3], LawMaker([], True, torch.device("cpu")))
    assert len(proposal.tokens[0]) == 3
    with torch.no_grad():
        ids = torch.tensor([PROMPT[0].tolist() + proposal.tokens[0][:2]])
        expected = small(ids).logits[0, -3:].softmax(-1)
    torch.testing.assert_close(proposal.q[0], expected, atol=1e-5, rtol=1e-4)


def test_an_assisted_generator_as_a_level_is_greedily_equal(target: Hooked) -> None:
    plain = target.generate(PROMPT, max_new_tokens=24, do_sample=False)
    generator = assisted(target, noisy(target, 0.05, 3), do_sample=False)
    output = hf_polyspec.generate(
        target, PROMPT, assistant_models=[generator], max_new_tokens=24, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, plain)
    assert output.polyspec.levels[0].accepted > 0


def test_a_generator_serves_one_row(target: Hooked) -> None:
    lookup = PromptLookupCandidateGenerator(max_length=30)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] .* serves at most 1 row"):
        hf_polyspec.generate(target, PROMPT.repeat(2, 1), assistant_models=[lookup], max_new_tokens=4)


def test_a_generator_that_fails_is_named(target: Hooked) -> None:
    class Broken(PromptLookupCandidateGenerator):
        def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            raise KeyError("lost")

    with pytest.raises(hf_polyspec.LevelError, match="Broken failed to propose: 'lost'"):
        hf_polyspec.generate(target, PROMPT, assistant_models=[Broken(max_length=30)], max_new_tokens=4)
