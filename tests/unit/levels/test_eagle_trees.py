# SPDX-License-Identifier: Apache-2.0
"""Trees: grown by a head, checked in one pass, kept as the accepted path; and chains where a model cannot."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from enumeration import Opaque
from scipy import stats
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import LogitsProcessorList, PreTrainedModel

from hf_polyspec.eagle import EagleHead, feature_layers, select_features
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.proposal import TreeProposal
from hf_polyspec.exactness.tree_geometry import ROOT, depths, path_to
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.host.trees import ancestors, hindrance
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.eagle_tree import grow
from hf_polyspec.telemetry.counters import LevelStats

WINDOWED: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "attention": "eager"},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
TREES = {"polyspec_tree_tokens": 20, "polyspec_tree_depth": 3, "polyspec_tree_top_k": 6}


pytestmark = pytest.mark.usefixtures("enabled")


def run(target: PreTrainedModel, levels: list[Any], inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    values = {
        "max_new_tokens": 16,
        "do_sample": False,
        "polyspec_block_size": 4,
        "return_dict_in_generate": True,
        **TREES,
        **options,
    }
    return target.generate(**inputs, assistant_models=levels, **values)


def plain(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    return target.generate(**inputs, **{"max_new_tokens": 16, "do_sample": False, **options})


def random_tree(count: int, dice: random.Random) -> tuple[list[int], list[int]]:
    parents = [dice.randrange(ROOT, node) for node in range(count)]
    return [(5 * node + dice.randrange(5)) % VOCABULARY for node in range(count)], parents


@torch.no_grad()
@pytest.mark.parametrize("model_type", list(WINDOWED))
def test_a_tree_pass_is_a_pass_over_each_path(model_type: str) -> None:
    """Ragged, left-padded rows over several rounds: logits of every node, and the cache that remains."""
    model = tiny(model_type, **WINDOWED[model_type])
    inputs, dice, counter = prompts(3), random.Random(2), LevelStats("model", 0)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    context = Context(inputs["input_ids"].tolist(), Prompt(mask.shape[1], mask, positions))
    padding = [int(columns) for columns in (mask == 0).sum(-1)]
    runner = ModelRunner(model, "model")
    for _ in range(4):
        grown = [random_tree(count, dice) for count in (dice.randrange(1, 6), 6, 3)]
        tree = TreeProposal([t for t, _ in grown], [p for _, p in grown], [[1] * len(t) for t, _ in grown])
        passed = runner.run_tree(context, tree, counter)
        paths = []
        for b, (tokens, parents) in enumerate(grown):
            text = context.ids[b][padding[b] :]
            for node in (ROOT, *range(len(tokens))):
                path = [tokens[n] for n in path_to(node, parents)]
                straight = model(torch.tensor([text + path])).logits[0, -1]
                torch.testing.assert_close(passed.logits[b, node + 1], straight, rtol=1e-4, atol=1e-4)
            paths.append(path_to(dice.randrange(ROOT, len(tokens)), parents))
        passed = runner.keep_paths(passed, context, tree, paths)
        kept = [[tokens[n] for n in path] for (tokens, _), path in zip(grown, paths, strict=True)]
        assert passed.read == context.extended(kept).ids
        context = context.extended([[*path, dice.randrange(VOCABULARY)] for path in kept])
    # What is cached serves an ordinary pass.
    logits = runner.run(context, [[], [], []], counter).logits
    for b, ids in enumerate(context.ids):
        straight = model(torch.tensor([ids[padding[b] :]])).logits[0, -1]
        torch.testing.assert_close(logits[b, 0], straight, rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_closed_under_ancestors_when_all_scores_tie() -> None:
    def best(states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*states.shape[:2], count)
        return torch.zeros(shape), torch.arange(count).expand(shape)

    def step(tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
        assert sees.shape == (2, 3, 3 * level)
        return features

    for total in range(1, 25):
        grown = grow(torch.zeros(2, 1, 4), [4, 2], [total, total], best, step, top_k=3)
        for parents, longest in zip(grown.parents, (4, 2), strict=True):
            assert all(parent < node for node, parent in enumerate(parents))
            assert max(depths(parents)) <= longest
            assert len(parents) == min(total, 3 + (longest - 1) * 9)
            # Shallower nodes first where all are equally likely.
            assert depths(parents) == sorted(depths(parents))


def test_ancestors() -> None:
    seen = ancestors([ROOT, ROOT, 0, 2, 1])
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0], [1], [0, 2], [0, 2, 3], [1, 4]]


class Spy(EagleDrafter):
    """Keeps what was asked, what features were known, and the tree that was proposed."""

    seen: list[tuple[list[int], int, int, list[int], list[int]]]

    def propose_tree(self, context: Any, limits: list[int], law: Any) -> Any:
        rows = self._known_pairs(context)
        tree = super().propose_tree(context, limits, law)
        for b, row in enumerate(rows if tree is not None else []):
            if row.count and limits[b] >= self.tree_depth:
                self.seen.append((row.ids, row.padding, row.end, tree.tokens[b], tree.parents[b]))
        return tree


@torch.no_grad()
def simulate(head: EagleHead, above: PreTrainedModel, ids: list[int], known: int) -> dict[tuple[int, ...], float]:
    """EAGLE-2's growth with lists, without caches or masks: the most likely paths with their log-probabilities."""
    layers = feature_layers(head.config, above.config.num_hidden_layers)
    states = above(torch.tensor([ids]), output_hidden_states=True).hidden_states
    known_features = list(head.fuse(select_features(states, layers))[0, :known])
    total, depth, top_k = TREES.values()

    def following(path: tuple[int, ...]) -> list[tuple[int, float]]:
        tokens, features = [*ids, *path], list(known_features)
        while True:
            hidden = head.step(torch.tensor([tokens[1 : len(features) + 1]]), torch.stack(features)[None])
            if len(tokens) == len(features) + 1:
                break
            features.append(hidden[0, -1])
        values, best = head.logits(hidden[0, -1]).log_softmax(-1).topk(top_k)
        return list(zip(head.draft_to_target(best).tolist(), values.tolist(), strict=True))

    pool = {(token,): score for token, score in following(())}
    front = list(pool)
    for _ in range(depth - 1):
        level = {(*path, token): pool[path] + score for path in front for token, score in following(path)}
        pool |= level
        front = sorted(level, key=lambda path: -level[path])[:top_k]
    best = sorted(pool, key=lambda path: (-pool[path], len(path)))[:total]
    return {path: pool[path] for path in best}


@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
@pytest.mark.parametrize(("batch", "middles"), [(1, 0), (3, 0), (1, 1), (3, 1)])
def test_grown_trees_equal_a_simulation(
    algorithm: str, batch: int, middles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Spy)
    monkeypatch.setattr(Spy, "seen", [], raising=False)
    target = tiny()
    levels: list[Any] = [noisy(target)] * middles
    above = [target, *levels][-1]
    head = head_for(above, algorithm, draft_vocab=list(range(0, VOCABULARY, 2)))
    run(target, [*levels, head], prompts(batch), max_new_tokens=10, polyspec_draft_copies=False)
    unread = 0
    for ids, padding, end, tokens, parents in Spy.seen:
        unread += end < len(ids) - 1
        expected = simulate(head, above, ids[padding:], end - padding)
        grown = {tuple(tokens[n] for n in path_to(node, parents)) for node in range(len(tokens))}
        assert grown == expected.keys()
    assert len(Spy.seen) > 2
    assert bool(unread) == bool(middles)


@pytest.mark.parametrize("model_type", list(WINDOWED))
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_is_the_targets_own(model_type: str, batch: int) -> None:
    target = tiny(model_type, **WINDOWED[model_type])
    inputs = prompts(batch)
    expected = plain(target, inputs)
    middle = noisy(target)
    accepted = 0
    for levels in ([head_for(target)], [middle, head_for(middle)]):
        output = run(target, levels, inputs)
        assert torch.equal(output.sequences, expected)
        assert not output.polyspec.levels[-2].notes
        accepted += output.polyspec.levels[-1].accepted
    assert accepted > 0, "the test means little unless some path is accepted"


def test_processors_with_memory_of_ids_and_rows_that_end() -> None:
    target = tiny(seed=3)
    inputs = prompts(4)
    free = plain(target, inputs)[:, inputs["input_ids"].shape[1] :]
    options = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    middle = noisy(target)
    for extra in (options, {"eos_token_id": [int(free[0, 3]), int(free[2, 6])]}):
        expected = plain(target, inputs, **extra)
        for levels in ([head_for(target)], [middle, head_for(middle)]):
            assert torch.equal(run(target, levels, inputs, **extra).sequences, expected)


def test_scores_are_those_of_the_emitted_positions() -> None:
    target, inputs = tiny(), prompts(1)
    values = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected, output = plain(target, inputs, **values), run(target, [head_for(target)], inputs, **values)
    for ours, theirs in zip(output.scores + output.logits, expected.scores + expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert output.polyspec.levels[1].accepted > 0


def test_processors_with_state_get_chains() -> None:
    target, inputs = tiny(), prompts(1)
    output = run(target, [head_for(target)], inputs, logits_processor=LogitsProcessorList([Opaque()]))
    assert torch.equal(output.sequences, plain(target, inputs))
    assert output.polyspec.levels[1].drafted > 0


@pytest.mark.parametrize(
    ("model_type", "settings", "options"),
    [
        ("bloom", {"attention": "eager"}, {}),
        ("falcon", {"alibi": True, "attention": "eager", "new_decoder_architecture": False}, {}),
        ("llama", {}, {"output_hidden_states": True}),
    ],
)
def test_where_trees_cannot_run_chains_do_and_it_is_said_once(
    model_type: str, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    target, inputs = tiny(model_type, **settings), prompts(1)
    output = run(target, [head_for(target)], inputs, **options)
    assert torch.equal(output.sequences, plain(target, inputs))
    assert output.polyspec.levels[1].drafted > 0
    assert len(output.polyspec.levels[0].notes) == 1
    assert "chains instead of trees" in output.polyspec.levels[0].notes[0]


def test_a_model_that_ignores_masks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target, other = tiny(), tiny(seed=4)
    genuine = other.forward

    def deaf(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return genuine(*args, **kwargs)

    monkeypatch.setattr(other, "forward", deaf)
    assert hindrance(target) is None
    assert "does not see a tree" in str(hindrance(other))


@pytest.mark.parametrize("options", [{"polyspec_tree_tokens": -1}, {"polyspec_tree_depth": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    target = tiny()
    with pytest.raises(ValueError, match="polyspec_tree"):
        run(target, [head_for(target)], prompts(1), **options)


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("middles", [0, 1])
def test_draws_follow_the_target(trees: bool, middles: int) -> None:
    """Chi-square of two tokens against the exact law; a correct chain fails with probability 1e-4 (seed fixed)."""
    settings = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    target, prompt, draws = tiny(**settings), torch.tensor([[3, 7, 1, 7]]), 4000
    with torch.no_grad():
        first = target(prompt).logits[0, -1].softmax(-1)
        texts = torch.cat([prompt.expand(8, -1), torch.arange(8)[:, None]], dim=1)
        law = first[:, None] * target(texts).logits[:, -1].softmax(-1)  # [8, 8]
    levels: list[Any] = [noisy(target, 0.2)] * middles
    above = [target, *levels][-1]
    torch.manual_seed(7)
    output = run(
        target,
        [*levels, head_for(above, "eagle1")],
        {"input_ids": prompt},
        do_sample=True,
        top_k=0,
        max_new_tokens=3 + 2 * middles,
        num_return_sequences=draws,
        polyspec_control="fixed",
        num_assistant_tokens=2,
        polyspec_tree_tokens=4 if trees else 0,
    )
    drawn = output.sequences[:, 4:6]
    observed = torch.bincount(drawn[:, 0] * 8 + drawn[:, 1], minlength=64).double()
    expected = law.flatten().double() * draws
    common = expected >= 5
    o = [*observed[common].tolist(), float(observed[~common].sum())]
    e = [*expected[common].tolist(), float(expected[~common].sum())]
    assert stats.chisquare(o, [value * sum(o) / sum(e) for value in e]).pvalue > 1e-4
    assert 0 < output.polyspec.levels[-1].accepted < output.polyspec.levels[-1].drafted
