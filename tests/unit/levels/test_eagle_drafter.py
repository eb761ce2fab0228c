# SPDX-License-Identifier: Apache-2.0
"""An EAGLE head as the lowest level: memos, drafted tokens, exactness, refusals."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import DynamicCache, PreTrainedModel

from hf_polyspec.eagle import EagleHead, feature_layers, select_features
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.generation.chain import check_assistants
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.eagle_memory import FeatureMemo, PairMemo, Pairs

pytestmark = pytest.mark.usefixtures("enabled")


def run(target: PreTrainedModel, levels: list[Any], inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    values = {
        "max_new_tokens": 16,
        "do_sample": False,
        "polyspec_block_size": 4,
        "num_assistant_tokens": 3,
        "return_dict_in_generate": True,
        **options,
    }
    return target.generate(**inputs, assistant_models=levels, **values)


def plain(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return target.generate(**inputs, **{"max_new_tokens": 16, "do_sample": False, **options})


def one_shot(head: EagleHead, row: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last output, keys and values of all pairs of a row, fed at once to an empty cache."""
    cache = head.new_cache()
    tokens = torch.tensor([row.ids[row.begin + 1 : row.end + 1]])
    positions = torch.arange(row.begin - row.padding, row.end - row.padding)[None]
    hidden = head.step(tokens, row.features.read(row.begin, row.end)[None], positions, None, cache)
    return hidden[0, -1], *(states[0] for states in cache.layer(0))


def feature(prefix: list[int], size: int) -> torch.Tensor:
    """Stands for the level above: a vector that the ids up to a position determine."""
    seed = sum((i + 1) * (token + 1) for i, token in enumerate(prefix))
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_incremental_prefill_is_one_shot_prefill(algorithm: str, chunk: int) -> None:
    """Rows accept, are cut short and fork at random; after every round the cache is as if fed at once."""
    head = head_for(tiny(), algorithm)
    size, memo, dice = head.config.hidden_size, PairMemo(head), random.Random(0)
    padding = [0, 2, 5]
    ids = [[dice.randrange(VOCABULARY) for _ in range(9)] for _ in padding]
    memories = [FeatureMemo() for _ in padding]
    for _ in range(15):
        rows = []
        for b, memory in enumerate(memories):
            first = max(0, min(memory.known(ids[b]), len(ids[b]) - 1) - dice.randrange(3))
            read = ids[b] + [dice.randrange(VOCABULARY) for _ in range(dice.randrange(3))]
            memory.store(read, torch.stack([feature(read[: i + 1], size) for i in range(first, len(read))]))
            begin = max(memory.begin, padding[b])
            rows.append(Pairs(list(ids[b]), begin, len(ids[b]) - 1, padding[b], memory))
        hidden, _ = memo.catch_up(rows, chunk)
        for b, row in enumerate(rows):
            last, keys, values = one_shot(head, row)
            torch.testing.assert_close(hidden[b, 0], last, rtol=1e-4, atol=1e-5)
            held_keys, held_values = memo.cache.layer(0)
            torch.testing.assert_close(held_keys[b, :, -row.count :], keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(held_values[b, :, -row.count :], values, rtol=1e-4, atol=1e-5)
        for _ in range(dice.randrange(4)):  # guesses, of which nothing may remain
            guess = torch.randint(VOCABULARY, (3, 1)), torch.randn(3, 1, size), torch.full((3, 1), 30)
            head.step(*guess, None, memo.cache)
        for row_ids in ids:
            del row_ids[len(row_ids) - dice.randrange(3) :]
            row_ids += [dice.randrange(VOCABULARY) for _ in range(1 + dice.randrange(4))]


class Spy(EagleDrafter):
    """Keeps what was asked, what features were known, and what was proposed."""

    seen: list[tuple[list[int], int, int, list[int]]]

    def propose(self, context: Any, limits: list[int], law: Any) -> Any:
        rows = self._known_pairs(context)
        proposal = super().propose(context, limits, law)
        for row, drawn, limit in zip(rows, proposal.tokens, limits, strict=True):
            self.seen.append((row.ids, row.padding, row.end if row.count and limit else -1, drawn))
        return proposal


@torch.no_grad()
def simulate(head: EagleHead, above: PreTrainedModel, ids: list[int], known: int, count: int) -> list[int]:
    """Greedy guesses from features of a plain forward pass, of which only the first `known` are used; no cache."""
    layers = feature_layers(head.config, above.config.num_hidden_layers)
    states = above(torch.tensor([ids]), output_hidden_states=True).hidden_states
    features = list(head.fuse(select_features(states, layers))[0, :known])
    tokens = list(ids)
    while True:
        pairs = tokens[1 : len(features) + 1]
        hidden = head.step(torch.tensor([pairs]), torch.stack(features)[None])
        if len(tokens) == len(features) + 1:
            if len(tokens) == len(ids) + count:
                return tokens[len(ids) :]
            best = head.logits(hidden[:, -1]).argmax(-1)
            tokens.append(int(head.draft_to_target(best)))
        features.append(hidden[0, -1])


@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("middles", [0, 1])
def test_drafted_tokens_equal_a_simulation(
    algorithm: str, batch: int, middles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Spy)
    monkeypatch.setattr(Spy, "seen", [], raising=False)
    target = tiny()
    levels: list[Any] = [noisy(target)] * middles
    above = [target, *levels][-1]
    head = head_for(above, algorithm, draft_vocab=list(range(0, VOCABULARY, 2)))
    run(target, [*levels, head], prompts(batch), polyspec_draft_copies=False)  # the simulation is of the head alone
    compared, unread = 0, 0
    for ids, padding, end, drawn in Spy.seen:
        if end < 0:
            assert drawn == []
            continue
        text = ids[padding:]
        known = end - padding
        unread += len(text) - 1 > known
        # A middle has read everything except what it drew last, when the target has drawn a token after it.
        assert len(text) - 1 - known <= middles
        assert drawn == simulate(head, above, text, known, len(drawn))
        compared += 1
    assert compared > 5
    assert bool(unread) == bool(middles)


@torch.no_grad()
def test_a_head_that_is_not_asked_keeps_features_and_not_the_states_they_are_made_of() -> None:
    above = tiny()
    head = head_for(above, "eagle3")
    layers = feature_layers(head.config, above.config.num_hidden_layers)
    drafter = EagleDrafter(head, layers, name="head", device=torch.device("cpu"))
    drafter.begin(1, 1, VOCABULARY)
    passes = 9
    for i in range(passes):
        fed = torch.randn(above.config.num_hidden_layers + 1, 1, 300, above.config.hidden_size)
        read = [j % VOCABULARY for j in range(300 * (i + 1))]
        drafter.watch(Pass(torch.zeros(1, 1, VOCABULARY), SimpleNamespace(hidden_states=tuple(fed)), 300, [read]))
        kept = [piece.shape[1] for *_, piece in drafter._unread]
        assert sum(kept) <= 1024
    memo = drafter.features[0]
    assert len(memo.ids) >= 300 * passes - 1024
    assert memo.begin == 0
    row = Context([[*read, 1]], Prompt(5, None, torch.arange(5)[None]))
    drafter.propose(row, [2], LawMaker([], False, torch.device("cpu")))
    assert memo.ids == read


ARCHITECTURES = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "bloom": {},
    "phi": {},
    "mistral": {"sliding_window": 6},
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "olmo2": {},
    "cohere": {},
}


EAGER = {"bloom", "gemma2"}


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_the_targets_own(model_type: str, batch: int) -> None:
    settings = ARCHITECTURES[model_type]
    target = tiny(model_type, attention="eager" if model_type in EAGER else "sdpa", **settings)
    inputs = prompts(batch)
    expected = plain(target, inputs)
    middle = noisy(target)
    for levels in ([head_for(target)], [head_for(target, "eagle1")], [middle, head_for(middle)]):
        output = run(target, levels, inputs)
        assert torch.equal(output.sequences, expected)
        assert output.polyspec.levels[-1].drafted > 0


def test_rows_that_end_early_leave_the_batch() -> None:
    target = tiny(seed=3)
    inputs = prompts(4)
    free = plain(target, inputs)[:, inputs["input_ids"].shape[1] :]
    ends = [int(free[0, 3]), int(free[2, 6])]
    expected = plain(target, inputs, eos_token_id=ends)
    middle = noisy(target)
    for levels in ([head_for(target)], [middle, head_for(middle)]):
        sequences = target.generate(
            **inputs, assistant_models=levels, eos_token_id=ends, max_new_tokens=16, do_sample=False
        )
        assert torch.equal(sequences, expected)


def test_a_prompt_in_pieces_is_drafted_from_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Spy)
    monkeypatch.setattr(Spy, "seen", [], raising=False)
    target = tiny()
    head, inputs = head_for(target), prompts(2, length=17)
    output = run(target, [head], inputs, prefill_chunk_size=4)
    assert torch.equal(output.sequences, plain(target, inputs))
    ids, _, end, drawn = Spy.seen[0]
    assert (len(ids), end) == (17, 16), "the pieces have been read before the first round"
    assert drawn == simulate(head, target, ids, end, 3)


def test_a_callers_cache_has_no_features_but_works() -> None:
    target = tiny()
    inputs = prompts(1, length=12)
    cache = DynamicCache()
    with torch.no_grad():
        target(inputs["input_ids"][:, :8], **{GENERATION_CACHE: cache})
    output = run(target, [head_for(target)], inputs, **{GENERATION_CACHE: cache})
    assert torch.equal(output.sequences, plain(target, inputs))
    assert output.polyspec.levels[1].drafted > 0


def test_nothing_is_drafted_when_every_known_id_is_forbidden() -> None:
    target = tiny()
    known = list(range(0, VOCABULARY, 2))
    for sample in (False, True):
        output = run(target, [head_for(target, draft_vocab=known)], prompts(2), suppress_tokens=known, do_sample=sample)
        assert output.polyspec.levels[1].drafted == 0
        assert output.polyspec.levels[1].forward_passes > 0


def test_confidence_and_schedule_act() -> None:
    target = tiny()
    head, inputs = head_for(target), prompts(1)
    sure = run(target, [head], inputs, assistant_confidence_threshold=1.0).polyspec.levels[0]
    assert len(sure.drafted_at) == 1, "a token below the threshold is proposed and ends the draft"
    shrinking = run(target, [head], inputs, num_assistant_tokens_schedule="heuristic").polyspec.levels[0]
    assert shrinking.drafted < run(target, [head], inputs).polyspec.levels[0].drafted


def test_the_callers_head_stays_bound_to_what_it_was() -> None:
    target, other = tiny(), tiny(seed=9)
    head = head_for(other)
    weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    before = head.borrowed, set(head._modules), head.config.to_dict(), weights
    run(target, [head], prompts(1))
    assert head.borrowed is before[0]
    assert set(head._modules) == before[1]
    assert head.config.to_dict() == before[2]
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[3][name])


def test_misfits_are_refused_in_one_sentence() -> None:
    target, wider = tiny(), tiny(hidden_size=64)
    head = head_for(target)
    with pytest.raises(ValueError, match="must come last"):
        check_assistants(target, [head, noisy(target)])
    with pytest.raises(ValueError, match=r"assistant_models\[0\].*wide"):
        check_assistants(wider, [head])
    with pytest.raises(ValueError, match=r"assistant_models\[1\].*wide"):
        check_assistants(target, [wider, head])
    with pytest.raises(ValueError, match="vocabulary"):
        check_assistants(tiny(vocab_size=4096), [head])
