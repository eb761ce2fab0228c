# SPDX-License-Identifier: Apache-2.0
"""Chains with models that carry a recurrent state: same text as plain generation, and drafting takes part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from states_in_modules import refused
from tiny_models import noisy, prompts, tiny
from transformers import PreTrainedModel

from hf_polyspec import SuffixDrafter
from hf_polyspec.host import manners, recurrent
from hf_polyspec.host.manners import Manner
from hf_polyspec.host.release import GENERATION_CACHE, cache_argument

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BLOCKS: dict[str, dict[str, Any]] = {
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 64, **MAMBA},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        **MAMBA,
    },
    "qwen3_next": {"num_experts": 4, "shared_expert_intermediate_size": 16, **HYBRID, **DELTA, **EXPERTS},
    "qwen3_5_text": {**HYBRID, **DELTA},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_experts": 4, "num_dense_layers": 1, **EXPERTS},
}
COLUMNS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "time_step_min": 0.8,
    },
}
NEW = 18


def made(kind: str, **settings: Any) -> PreTrainedModel:
    return tiny(kind, attention="eager", **({**BLOCKS, **COLUMNS}[kind] | settings))


def chains(model: PreTrainedModel) -> dict[str, list[Any]]:
    return {
        "drafter": [noisy(model, 0.05)],
        "middle": [noisy(model, 0.03), SuffixDrafter(min_match=1)],
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [*BLOCKS, *COLUMNS])
def test_greedy_text_is_plain_generations(enabled: None, kind: str, batch: int) -> None:
    """The family as target, as middle and as drafter, in batches with padding."""
    model = made(kind)
    call = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**call)
    for name, chain in chains(model).items():
        assert model.generate(**call, assistant_models=chain).tolist() == plain.tolist(), name


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [*BLOCKS, *COLUMNS])
def test_drafting_takes_part(enabled: None, kind: str, batch: int) -> None:
    model = made(kind)
    call = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    got = model.generate(**call, assistant_models=[noisy(model, 0.0)], num_assistant_tokens=5)
    assert got.sequences.tolist() == model.generate(**call).sequences.tolist()
    assert got.polyspec.levels[0].forward_passes <= 0.4 * NEW
    assert any("earlier states" in note and "bytes" in note for note in got.polyspec.levels[0].notes)


@pytest.mark.parametrize(("kind", "sampled"), [("qwen3_next", False), ("bamba", True)])
def test_what_is_replayed_is_what_would_be_fed_again(
    enabled: None, kind: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Target and middle, uneven rows behind padding: the same text as from pictures alone, with fewer columns."""
    model, fed = made(kind), list[int]()
    chain = [noisy(model, 0.05), noisy(model, 0.15)]
    for level in (model, chain[0]):
        level.register_forward_pre_hook(lambda *call: fed.append(call[2]["input_ids"].shape[1]), with_kwargs=True)

    def text(**more: Any) -> Any:
        torch.manual_seed(3)
        fed.clear()
        return model.generate(**prompts(3), max_new_tokens=24, do_sample=sampled, **more).tolist()

    plain = text()
    assert text(assistant_models=chain) == plain
    columns, passes = sum(fed), len(fed)
    monkeypatch.setattr(recurrent, "can_replay", lambda _: False)
    assert text(assistant_models=chain) == plain
    assert (columns, passes) < (0.75 * sum(fed), len(fed))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_pass_of_a_hybrid_emits_what_one_of_its_attention_only_twin_does(enabled: None, batch: int) -> None:
    """Putting states back costs columns, no passes of their own: with an exact copy as drafter, at any batch."""

    def tokens_a_pass(*kinds: str) -> float:
        model = made("qwen3_next", num_hidden_layers=4, layer_types=list(kinds))
        call = {**prompts(batch), "max_new_tokens": 90, "do_sample": False, "return_dict_in_generate": True}
        got = model.generate(**call, assistant_models=[noisy(model, 0.0)], num_assistant_tokens=5)
        return 90 / float(got.polyspec.levels[0].forward_passes)

    hybrid = tokens_a_pass("linear_attention", "linear_attention", "linear_attention", "full_attention")
    twin = tokens_a_pass(*["full_attention"] * 4)
    assert twin > 5
    assert hybrid >= 0.9 * twin


def test_one_column_a_pass_is_offered_no_draft(enabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no layer can be made to read on; plain speed is what there is, and it is said."""
    monkeypatch.setattr(manners, "_WAYS", (Manner.BLOCKS, Manner.STEPS))
    model = made("jamba")
    call = {**prompts(3), "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    levels = model.generate(**call, assistant_models=[noisy(model, 0.0)]).polyspec.levels
    assert levels[0].forward_passes == NEW
    assert not levels[1].forward_passes
    assert any("one token a pass" in note for note in levels[0].notes)


@pytest.mark.parametrize("batch", [1, 3])
def test_under_a_target_with_attention_only(
    enabled: None, target: PreTrainedModel, drafter: PreTrainedModel, batch: int
) -> None:
    call = {**prompts(batch), "max_new_tokens": 10, "do_sample": False}
    plain = target.generate(**call)
    blocks, steps = made("mamba2"), made("mamba")
    for chain in ([blocks], [blocks, drafter], [drafter, blocks], [steps, drafter], [drafter, steps]):
        assert target.generate(**call, assistant_models=chain).tolist() == plain.tolist()


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "jamba"])
def test_rows_that_end_early_and_other_ways_to_read(enabled: None, kind: str) -> None:
    """Rows leave the batch at an end of text; prompts are read in pieces; nothing is cached."""
    model = made(kind)
    call = {**prompts(3), "max_new_tokens": 14, "do_sample": False}
    ends = [int(row[-9]) for row in model.generate(**call)[:2]]
    for more in ({"eos_token_id": ends}, {"prefill_chunk_size": 4}, {"use_cache": False}):
        plain = model.generate(**call, **more)
        assert model.generate(**call, **more, assistant_models=[noisy(model, 0.05)]).tolist() == plain.tolist(), more


def _held(cache: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    """States, and keys and values of columns that are no padding."""
    found = []
    for layer in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            found += [state for state in getattr(layer, name, {}).values() if state is not None]
        for name in ("keys", "values"):
            states = getattr(layer, name, None)
            if states is not None:
                seen = torch.ones(mask.shape[0], states.shape[2], dtype=torch.bool)
                seen[:, : mask.shape[1]] = mask.bool()
                found.append(states * seen[:, None, :, None])
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2", "falcon_h1", "jamba"])
def test_the_cache_handed_back_is_plain_generations(enabled: None, kind: str, batch: int) -> None:
    """All but the last token, and a second turn goes on from it."""
    model = made(kind)
    inputs = prompts(batch)
    call = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    chain: Callable[[], dict[str, Any]] = lambda: {"assistant_models": [noisy(model, 0.05)]}  # noqa: E731
    name, argument = GENERATION_CACHE, cache_argument(model)
    plain, got = model.generate(**inputs, **call), model.generate(**inputs, **call, **chain())
    for one, other in zip(
        _held(plain[name], inputs["attention_mask"]), _held(got[name], inputs["attention_mask"]), strict=True
    ):
        torch.testing.assert_close(other, one, atol=1e-4, rtol=1e-4)
    more = torch.randint(3, 48, (batch, 7), generator=torch.Generator().manual_seed(5))
    # Plain generation does not cut ids to what a cache of states alone lacks: they are what comes after it.
    start = plain.sequences[:, -1:] if all(plain[name].is_linear) else plain.sequences
    ids = torch.cat([start, more], dim=1)
    mask = torch.ones_like(ids)
    if start.shape[1] > 1:
        mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    turn = {"input_ids": ids, "attention_mask": mask, **call}
    second, again = (
        model.generate(**turn, **{argument: plain[name]}),
        model.generate(**turn, **{argument: got[name]}, **chain()),
    )
    assert again.sequences.tolist() == second.sequences.tolist()


@pytest.mark.parametrize("given", ["inputs_embeds", "both", "masked"])
@pytest.mark.parametrize("kind", ["mamba2", "mamba"])
def test_embeddings_after_states_that_nobody_counted(enabled: None, kind: str, given: str) -> None:
    """Plain generation reads all of them as what comes after the cache, which says of no token that it holds it."""
    model, call = made(kind), {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    ids, argument = prompts(2)["input_ids"], cache_argument(model)
    call["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    if given == "both":
        call["input_ids"] = ids
    if given == "masked":
        call["attention_mask"] = torch.ones_like(ids)

    def after_states(**chain: Any) -> Any:
        with torch.no_grad():
            begun = model(inputs_embeds=call["inputs_embeds"][:, :-1], use_cache=True)
        return model.generate(**call, **chain, output_logits=True, **{argument: begun[argument]})

    plain = after_states()
    for below in (["suffix"], [noisy(model, 0.05)], [noisy(model, 0.02), noisy(model, 0.05, seed=2)]):
        got = after_states(assistant_models=below)
        assert got.sequences.tolist() == plain.sequences.tolist()
        for one, other in zip(got.logits, plain.logits, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def _frequencies(model: PreTrainedModel, calls: int, **options: Any) -> torch.Tensor:
    """How often each of the 6 x 6 pairs of two new tokens was drawn."""
    ids = torch.tensor([[1, 4, 2]]).repeat(100, 1)
    counts = torch.zeros(36)
    for _ in range(calls):
        drawn = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=True, top_k=0, **options
        )
        pairs = drawn[:, 3] * 6 + drawn[:, 4]
        counts += torch.bincount(pairs, minlength=36)
    return counts


@pytest.mark.parametrize("rule", ["token", "block"])
def test_sampled_pairs_follow_the_targets_law(enabled: None, rule: str) -> None:
    """Chi-square against the target's exact law at a false-alarm rate of 1e-4, seed fixed; 2,000 draws."""
    model = tiny("mamba2", attention="eager", **BLOCKS["mamba2"], vocab_size=6)
    other = noisy(model, 0.3)
    with torch.no_grad():
        first = model(torch.tensor([[1, 4, 2]])).logits[0, -1].softmax(-1)
        texts = torch.tensor([[1, 4, 2, n] for n in range(6)])
        second = model(texts).logits[:, -1].softmax(-1)
    expected = (first[:, None] * second).flatten() * 2000
    torch.manual_seed(11)
    counts = _frequencies(model, 20, assistant_models=[other, noisy(model, 0.6)], polyspec_verification=rule)
    usual = expected >= 5
    seen = torch.cat([counts[usual], counts[~usual].sum()[None]])
    wanted = torch.cat([expected[usual], expected[~usual].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    freedom = torch.tensor(float(len(wanted) - 1))
    assert float(torch.special.gammaincc(freedom / 2, torch.tensor(statistic / 2))) > 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_a_state_in_the_models_own_modules_under_attention(
    enabled: None, target: PreTrainedModel, drafter: PreTrainedModel, batch: int
) -> None:
    """As middle and as drafter, and the same object as both."""
    model = tiny("recurrent_gemma", attention="eager", lru_width=32, block_types=["recurrent", "attention"])
    if refused(model):
        return
    call = {**prompts(batch), "max_new_tokens": 10, "do_sample": False}
    plain = target.generate(**call)
    for chain in ([model, drafter], [drafter, model], [model, model]):
        assert target.generate(**call, assistant_models=chain).tolist() == plain.tolist()
