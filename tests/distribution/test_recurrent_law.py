# SPDX-License-Identifier: Apache-2.0
"""Models that carry a state, above and under levels with attention: the law of the text, and ways to break it.

Chi-square tests of the third and fourth token drawn against the target's exact law: each has a false-alarm rate of
1e-4, with its seed fixed, and a state that is not put back fails by far; one of which only the convolution's
window is put back is found by the probe.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broken_states import break_rollback, nothing, windows
from tiny_models import noisy, prompts, tiny
from transformers import PreTrainedModel

from hf_polyspec.host import recurrent, replay
from hf_polyspec.host.manners import Manner, manner_of

VOCABULARY = 6
PROMPT, NEW = [1, 4, 2, 3, 5, 1, 3, 2, 4, 4, 1, 5, 2, 3, 1, 4], 4
"""Long enough that a state of it is kept: less is read again with every draft."""

ROWS, CALLS = 100, 10
STATE = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
LAYERS = ["linear_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
HYBRID = {
    **EXPERTS,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def state() -> PreTrainedModel:
    return tiny("mamba2", attention="eager", **STATE, vocab_size=VOCABULARY)


def attention() -> PreTrainedModel:
    return tiny("llama", attention="eager", vocab_size=VOCABULARY)


def _chain(order: str) -> tuple[PreTrainedModel, list[Any]]:
    """Models that agree in about half of what they say, of a kind each: s for a state, a for attention."""
    kinds = {"s": state, "a": attention}
    made = [noisy(kinds[kind](), 0.3 * place, seed=place + 1) for place, kind in enumerate(order)]
    return made[0], made[1:]


@torch.no_grad()
def _law(model: PreTrainedModel) -> torch.Tensor:
    """Chances of all texts of N new tokens, `[V] * N` flattened, read as whole texts."""
    law, texts = torch.ones(1), torch.tensor([PROMPT])
    for _ in range(NEW):
        law = (law[:, None] * model(texts, use_cache=False).logits[:, -1].softmax(-1)).flatten()
        more = torch.arange(VOCABULARY).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(VOCABULARY, 0), more], dim=1)
    return law


def _chance(model: PreTrainedModel, chain: list[Any], rule: str) -> float:
    """Of counts of the last two tokens as far from the target's law, if they follow it."""
    wanted = _law(model).view(-1, VOCABULARY**2).sum(0) * ROWS * CALLS
    ids = torch.tensor([PROMPT]).repeat(ROWS, 1)
    counts = torch.zeros(VOCABULARY**2)
    torch.manual_seed(11)
    for _ in range(CALLS):
        drawn = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=True,
            top_k=0,
            assistant_models=chain,
            polyspec_verification=rule,
        )
        counts += torch.bincount(drawn[:, -2] * VOCABULARY + drawn[:, -1], minlength=VOCABULARY**2)
    usual = wanted >= 5
    seen = torch.cat([counts[usual], counts[~usual].sum()[None]])
    wanted = torch.cat([wanted[usual], wanted[~usual].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2), statistic / 2))


@pytest.mark.parametrize(("order", "rule"), [("sa", "token"), ("as", "token"), ("asa", "block"), ("sas", "block")])
def test_pairs_follow_the_targets_law(enabled: None, order: str, rule: str) -> None:
    assert _chance(*_chain(order), rule) > 1e-4


def test_a_state_that_is_not_put_back_is_caught(enabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chain = _chain("sa")
    assert manner_of(model) is Manner.BLOCKS
    break_rollback(monkeypatch, nothing)
    assert _chance(model, chain, "token") < 1e-8


def test_a_replay_that_goes_too_far_is_caught(enabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the trial would not have kept it from being used: windows behind what the best row accepted."""
    right = replay._window
    monkeypatch.setattr(replay, "_window", lambda old, new, counts: right(old, new, [max(counts)] * len(counts)))
    model, chain = _chain("sa")
    assert not replay.can_replay(model)
    monkeypatch.setattr(recurrent, "can_replay", lambda _: True)
    assert _chance(model, chain, "token") < 1e-8


@pytest.mark.parametrize("wrong", [nothing, windows], ids=["none", "window"])
@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next"])
def test_the_probe_would_say_so(monkeypatch: pytest.MonkeyPatch, kind: str, wrong: Any) -> None:
    """A model whose state comes back otherwise than it was is not served with drafts."""
    made = [
        state() if kind == "mamba2" else tiny(kind, attention="eager", layer_types=LAYERS, **HYBRID) for _ in range(2)
    ]
    assert manner_of(made[0]) is Manner.BLOCKS
    break_rollback(monkeypatch, wrong)
    assert manner_of(made[1]) is not Manner.BLOCKS


@pytest.mark.parametrize("order", ["sa", "as", "sas"])
def test_the_same_seed_gives_the_same_text(enabled: None, order: str) -> None:
    model, chain = _chain(order)
    ids = prompts(3)["input_ids"].clamp(max=VOCABULARY - 1)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": True}
    torch.manual_seed(5)
    plain = model.generate(**call)
    torch.manual_seed(5)
    found = model.generate(**call, assistant_models=chain, return_dict_in_generate=True)
    assert found.sequences.tolist() == plain.tolist()
    assert 0 < found.polyspec.levels[0].accepted < found.polyspec.levels[0].drafted


def test_a_state_costs_no_passes(enabled: None) -> None:
    """A copy as drafter: tokens a target pass, with a state and with attention in its place."""
    found = []
    for model in (
        tiny("qwen3_next", attention="eager", layer_types=LAYERS, **HYBRID),
        tiny("qwen3_moe", attention="eager", **EXPERTS),
    ):
        call = {**prompts(1), "max_new_tokens": 48, "do_sample": False, "return_dict_in_generate": True}
        got = model.generate(**call, assistant_models=[noisy(model, 0.0)], num_assistant_tokens=5)
        found.append(48 / got.polyspec.levels[0].forward_passes)
    assert found[0] >= 0.9 * found[1]
