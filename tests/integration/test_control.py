# SPDX-License-Identifier: Apache-2.0
"""`polyspec_control` and `polyspec_bias_budget` through generate(): levels switched at random, heads that were off."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from coin_flips import CoinFlips
from tiny_models import head_for, noisy, prompts, tiny
from watched_passes import watched_caches

from hf_polyspec.control import forget, led
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.generation.chain import build_chain
from hf_polyspec.generation.options import PolySpecOptions
from hf_polyspec.generation.setting import Setting
from hf_polyspec.host.compatibility import vocabulary_size
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.levels.verifier import NoDraft

WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": {}, "mistral": {"sliding_window": 5}, "gemma3_text": WINDOWS}
NEW = 24


@pytest.fixture(autouse=True)
def _nothing_learnt(enabled: None) -> None:
    """Chains run, and no test starts from what another one measured."""
    forget()


def flipped(monkeypatch: pytest.MonkeyPatch, target: Any, levels: list[Any], request: dict[str, Any]) -> Any:
    monkeypatch.setattr(led, "OnlineControl", CoinFlips)
    with watched_caches():
        return target.generate(
            **request, assistant_models=levels, polyspec_control="online", return_dict_in_generate=True
        )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_switching_at_random_leaves_greedy_texts_alone(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny(kind, **KINDS[kind])
    levels = [noisy(target, 0.03, seed=1), noisy(target, 0.06, seed=2)]
    request = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    plain = target.generate(**request)
    output = flipped(monkeypatch, target, levels, request)
    assert torch.equal(output.sequences, plain)
    used = {decision.levels for decision in output.polyspec.decisions}
    assert used == {(0,), (0, 1), (0, 2), (0, 1, 2)}
    for level in output.polyspec.levels[1:]:
        assert level.switched_off > 0
        assert level.switched_on > 0
    # An end of text in the middle of blocks, a streamer and a stop criterion see the same.
    end = int(plain[0, -NEW // 2])
    ending = request | {"eos_token_id": end}
    assert torch.equal(flipped(monkeypatch, target, levels, ending).sequences, target.generate(**ending))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tree", [0, 6])
@pytest.mark.parametrize("middle", [False, True])
def test_heads_that_are_switched_at_random(
    middle: bool, tree: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny()
    copy = noisy(target, 0.03, seed=1)
    head = head_for(copy if middle else target)
    request = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    levels = [copy, head] if middle else [head]
    options = request | {"polyspec_tree_tokens": tree, "polyspec_tree_depth": 3}
    output = flipped(monkeypatch, target, levels, options)
    assert torch.equal(output.sequences, target.generate(**request))
    used = {decision.levels for decision in output.polyspec.decisions}
    # A head serves under the model it was made for and under no other.
    assert used == ({(0,), (0, 1), (0, 1, 2)} if middle else {(0,), (0, 1)})


@torch.no_grad()
@pytest.mark.parametrize("sampled", [False, True])
def test_a_head_that_was_off_proposes_what_one_never_off_proposes(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only one that was asked has guesses that were rejected to learn from.
    monkeypatch.setattr("hf_polyspec.levels.recycling.RecyclePointer.suggestion", lambda *_: None)
    target = tiny()
    head = head_for(target)
    ids = prompts(2)["input_ids"].tolist()
    prompt = Prompt(len(ids[0]), None, torch.arange(len(ids[0])).expand(2, -1))
    law = LawMaker([], sampled, torch.device("cpu"))
    last = []
    for off in (set(), {2, 3, 4, 5, 6}):
        torch.manual_seed(1)
        options = PolySpecOptions(num_assistant_tokens=3)
        setting = Setting(options, torch.device("cpu"), frozenset(), 0, 2)
        chain = build_chain(target, [head], setting, ModelRunner(target, "the target"))
        chain.begin(0, 2, vocabulary_size(target))
        context = Context([list(row) for row in ids], prompt)
        text = [target.generate(torch.tensor([row]), max_new_tokens=40, do_sample=False)[0].tolist() for row in ids]
        for step in range(8):
            chain.source = NoDraft() if step in off else chain.below
            # The same text however the rounds went: what the target has read is what counts.
            chain.round(context, [1, 1] if step in off else [9, 9], LawMaker([], False, law.device))
            context = Context([row[: len(ids[0]) + 3 * (step + 1)] for row in text], prompt)
        drafter = chain.below
        assert isinstance(drafter, EagleDrafter)
        chain.runner.run(context, [[], []], chain.stats)
        torch.manual_seed(2)
        last.append(drafter.propose(context, [9, 9], law))
    never, once = last
    assert never.tokens == once.tokens
    assert never.tokens[0]
    if sampled:
        assert never.q is not None
        assert once.q is not None
        torch.testing.assert_close(never.q, once.q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_online_with_every_kind_of_drafter(do_sample: bool, batch: int) -> None:
    target = tiny()
    request = {**prompts(batch), "max_new_tokens": NEW, "do_sample": do_sample}
    for levels in ([noisy(target, 0.05)], [noisy(target, 0.03), SuffixDrafter()], [SuffixDrafter()]):
        torch.manual_seed(0)
        output = target.generate(
            **request, assistant_models=levels, polyspec_control="online", return_dict_in_generate=True
        )
        assert output.sequences.shape == (batch, request["input_ids"].shape[1] + NEW)
        assert output.polyspec.decisions[0].levels == (0,)
        assert output.polyspec.to_dict()["decisions"][0]["reason"]
        if not do_sample:
            assert torch.equal(output.sequences, target.generate(**request))


def test_what_was_learnt_is_remembered_until_the_target_goes() -> None:
    target = tiny()
    levels = [SuffixDrafter()]
    request = {**prompts(1), "max_new_tokens": NEW, "do_sample": False, "assistant_models": levels}
    starts = []
    for _ in range(2):
        output = target.generate(**request, polyspec_control="online", return_dict_in_generate=True)
        starts.append(output.polyspec.decisions[0].reason)
    assert starts[0].startswith("start")
    assert not starts[1].startswith("start")


def test_a_callers_drafter_comes_back_as_it_was() -> None:
    from hf_polyspec.exactness.proposal import Proposal
    from hf_polyspec.levels.sequential import SequentialDrafter

    class Mine(SequentialDrafter):
        def propose(self, context: Any, limits: list[int], law: Any) -> Proposal:
            return Proposal([[] for _ in limits], None, [[] for _ in limits])

    mine = Mine(name="mine", draft_tokens=9, confidence_threshold=0, schedule="heuristic", eos=frozenset())
    tiny().generate(**prompts(1), max_new_tokens=8, do_sample=False, assistant_models=[mine], polyspec_control="online")
    assert (mine.draft_tokens, mine.schedule) == (9, "heuristic")


def test_a_lossy_run_reports_its_bias_and_accepts_more() -> None:
    target = tiny()
    drafter = noisy(target, 0.3)
    request = {**prompts(2), "max_new_tokens": 60, "do_sample": True, "assistant_models": [drafter]}
    accepted = []
    for budget in (0.0, 0.9):
        torch.manual_seed(0)
        stats = target.generate(**request, polyspec_bias_budget=budget, return_dict_in_generate=True).polyspec
        accepted.append(stats.levels[0].acceptance_rate)
        assert len(stats.bias) == 2
        assert (min(stats.bias) > 0) == (budget > 0)
        assert stats.levels[0].bias == pytest.approx(sum(stats.bias))
        assert stats.to_dict()["bias"] == stats.bias
    assert accepted[1] > accepted[0] + 0.1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"polyspec_control": "auto"}, "polyspec_control must be one of 'fixed', 'online', got 'auto'."),
        ({"polyspec_bias_budget": 1.5}, "polyspec_bias_budget must be a number from 0 to 1, got 1.5."),
        ({"polyspec_bias_budget": True}, "polyspec_bias_budget must be a number from 0 to 1, got True."),
        ({"polyspec_bias_budget": 0.1}, "polyspec_bias_budget needs do_sample=True: greedy decoding has no"),
        (
            {"polyspec_bias_budget": 0.1, "do_sample": True, "polyspec_verification": "block"},
            "polyspec_bias_budget is defined token by token",
        ),
    ],
)
def test_refusals(options: dict[str, Any], sentence: str) -> None:
    target = tiny()
    request = {**prompts(1), "max_new_tokens": 4, "do_sample": False, "assistant_models": [SuffixDrafter()]}
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        target.generate(**{**request, **options})
