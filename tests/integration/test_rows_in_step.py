# SPDX-License-Identifier: Apache-2.0
"""Models that count positions by the columns of their cache: batches whose rows accept different numbers of tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import BartConfig, BartForCausalLM, PreTrainedModel

from hf_polyspec import SuffixDrafter
from hf_polyspec.host.in_step import rows_may_part

NEW = 16


def counting(kind: str, attention: str = "sdpa") -> PreTrainedModel:
    """A tiny model of a family that counts positions by columns."""
    if kind == "roformer":
        return tiny(kind, attention="eager", is_decoder=True, embedding_size=32)
    if kind == "trocr":
        return tiny(
            kind, attention="eager", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
        )
    config = BartConfig(
        vocab_size=48,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        init_std=0.3,
        pad_token_id=0,
        is_decoder=True,
        is_encoder_decoder=False,
        forced_eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BartForCausalLM(config).float().eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", ["bart", "roformer", "trocr"])
def test_rows_that_accept_different_lengths(enabled: None, kind: str) -> None:
    """The text of plain generate(), with and without padding; the statistics say how rows ran."""
    model = counting(kind)
    assert not rows_may_part(model)
    options = {"max_new_tokens": NEW, "do_sample": False}
    for inputs in (prompts(3), {"input_ids": prompts(1)["input_ids"].repeat(3, 1) + torch.tensor([[0], [1], [2]])}):
        plain = model.generate(**inputs, **options)
        for chain in (
            [noisy(model, 0.05)],
            [noisy(model, 0.02), noisy(model, 0.05, seed=2)],
            [SuffixDrafter(min_match=1)],
        ):
            found = model.generate(**inputs, **options, assistant_models=chain, return_dict_in_generate=True)
            assert found.sequences.tolist() == plain.tolist()
            target = found.polyspec.levels[0]
            assert 0 < target.accepted < target.drafted, "rows that accept alike show nothing"
            assert any("in step" in note for note in target.notes)


def test_the_copy_that_is_always_right_is_worth_its_passes(enabled: None) -> None:
    model = counting("bart")
    found = model.generate(
        **prompts(3),
        max_new_tokens=NEW,
        do_sample=False,
        assistant_models=[noisy(model, 0.0)],
        num_assistant_tokens=5,
        return_dict_in_generate=True,
    )
    assert found.polyspec.levels[0].forward_passes <= 1 + NEW // 6


def test_a_single_row_asks_nothing(enabled: None) -> None:
    """One row has nobody to part from: no pass is spent on the question."""
    model = tiny("llama")
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = model.generate(
        **prompts(1),
        max_new_tokens=4,
        do_sample=False,
        assistant_models=[SuffixDrafter()],
        return_dict_in_generate=True,
    )
    assert len(passes) == found.polyspec.levels[0].forward_passes
    assert not found.polyspec.levels[0].notes
