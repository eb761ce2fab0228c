# SPDX-License-Identifier: Apache-2.0
"""The head's forward pass: caches, padding, trees, long contexts, vocabulary slices, binding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_polyspec.eagle import EagleHead, EagleHeadConfig, HeadCache
from hf_polyspec.eagle.masks import attention_mask_4d, default_positions

V, H = 41, 16
SIZES = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 20, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
CLOSE = {"atol": 2e-6, "rtol": 2e-5}


def make(algorithm: str = "eagle3", **fields: Any) -> EagleHead:
    torch.manual_seed(0)
    attention = fields.pop("attn_implementation", "sdpa")
    config = EagleHeadConfig(algorithm=algorithm, **SIZES, **fields)
    config._attn_implementation = attention
    head = EagleHead(config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head.bind(nn.Embedding(V, H), nn.Linear(H, V, bias=False))


def inputs(batch: int, count: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (batch, count), generator=generator)
    return tokens, torch.randn(batch, count, H, generator=generator)


@pytest.fixture(params=["eagle1", "eagle3", "eagle3 two layers", "eagle3 eager"])
def head(request: pytest.FixtureRequest) -> EagleHead:
    algorithm, _, rest = request.param.partition(" ")
    fields: dict[str, Any] = {
        "two layers": {"num_hidden_layers": 2},
        "eager": {"attn_implementation": "eager"},
    }.get(rest, {})
    return make(algorithm, **fields)


@torch.no_grad()
def test_chunked_prefill_equals_one_pass(head: EagleHead) -> None:
    tokens, features = inputs(2, 9)
    whole = head.step(tokens, features)
    cache, pieces = head.new_cache(), []
    for piece in (slice(0, 1), slice(1, 5), slice(5, 6), slice(6, 9)):
        pieces.append(head.step(tokens[:, piece], features[:, piece], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    assert cache.length == 9


@torch.no_grad()
def test_left_padding_changes_nothing(head: EagleHead) -> None:
    tokens, features = inputs(1, 5)
    alone = head.step(tokens, features)
    padding_tokens, padding_features = inputs(1, 3, seed=8)
    both = torch.cat([padding_tokens, tokens], 1), torch.cat([padding_features, features], 1)
    other_tokens, other_features = inputs(1, 8, seed=9)
    batch = torch.cat([both[0], other_tokens]), torch.cat([both[1], other_features])
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    whole = head.step(*batch, attention_mask=mask)
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[:1, 3:], alone, **CLOSE)
    torch.testing.assert_close(whole[1:], head.step(other_tokens, other_features), **CLOSE)
    cache, pieces = head.new_cache(), []
    for stop, start in ((4, 0), (5, 4), (8, 5)):
        part = head.step(batch[0][:, start:stop], batch[1][:, start:stop], None, mask[:, :stop], cache)
        pieces.append(part)
    torch.testing.assert_close(torch.cat(pieces, 1)[:1, 3:], alone, **CLOSE)


def test_every_query_sees_something_and_padding_takes_no_position() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    for past, count in ((0, 5), (2, 3), (4, 1)):
        visible, causal = attention_mask_4d(mask, past, count, mask.device, torch.float32)
        assert not causal
        assert visible is not None
        assert visible.any(-1).all()
        assert torch.equal(visible[1, 0], torch.ones(count, 5, dtype=torch.bool).tril(past))
    assert default_positions(mask, 0, 5, mask.device).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 3, 4],
        [0, 0, 0, 0, 0],
    ]
    assert default_positions(mask, 3, 2, mask.device).tolist() == [[1, 2], [3, 4], [0, 0]]
    assert default_positions(None, 3, 2, mask.device).tolist() == [[3, 4]]


def tree(parents: list[int], past: int, hole: int | None = None) -> torch.Tensor:
    """[1, 1, T, past + T] boolean: all past entries but `hole`, ancestors, and the node itself."""
    count = len(parents)
    mask = torch.zeros(count, past + count, dtype=torch.bool)
    mask[:, :past] = True
    if hole is not None:
        mask[:, hole] = False
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node, past:] = mask[parent, past:]
        mask[node, past + node] = True
    return mask[None, None]


@torch.no_grad()
@pytest.mark.parametrize("additive", [True, False])
def test_every_path_of_a_tree_equals_a_chain(head: EagleHead, additive: bool) -> None:
    tokens, features = inputs(1, 6)
    nodes, node_features = inputs(1, 5, seed=4)
    parents, depths = [-1, -1, 0, 1, 2], [0, 0, 1, 1, 2]
    cache = head.new_cache()
    head.step(tokens, features, cache=cache)
    mask = tree(parents, 6)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.tensor([[6 + depth for depth in depths]])
    grown = head.step(nodes, node_features, positions, mask, cache)
    for leaf in (3, 4):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        chain = head.new_cache()
        head.step(tokens, features, cache=chain)
        straight = head.step(nodes[:, path], node_features[:, path], cache=chain)
        torch.testing.assert_close(grown[:, path], straight, **CLOSE)


@torch.no_grad()
def test_tree_grown_level_by_level_then_forgotten(head: EagleHead) -> None:
    """Frontier nodes go in level by level; after a crop the stable entries are as if nothing had happened."""
    tokens, features = inputs(2, 6)
    nodes, node_features = inputs(2, 6, seed=4)
    cache = head.new_cache()
    head.step(tokens, features, cache=cache)
    parents = [-1, -1, 0, 0, 3, 2]
    whole_cache = copy.deepcopy(cache)
    positions = torch.tensor([[6, 6, 7, 7, 8, 8]])
    whole = head.step(nodes, node_features, positions, tree(parents, 6), whole_cache)
    for start, stop in ((0, 2), (2, 4), (4, 6)):
        mask = tree(parents, 6)[:, :, start:stop, : 6 + stop]
        part = head.step(nodes[:, start:stop], node_features[:, start:stop], positions[:, start:stop], mask, cache)
        torch.testing.assert_close(part, whole[:, start:stop], **CLOSE)
    cache.crop(6)
    more = inputs(2, 2, seed=5)
    fresh = head.new_cache()
    head.step(tokens, features, cache=fresh)
    torch.testing.assert_close(head.step(*more, cache=cache), head.step(*more, cache=fresh), **CLOSE)


@torch.no_grad()
def test_gather_keeps_an_accepted_path(head: EagleHead) -> None:
    """Rows keep different paths; gathered entries equal those of a cache that never saw the rest."""
    tokens, features = inputs(2, 4)
    nodes, node_features = inputs(2, 4, seed=4)
    cache = head.new_cache()
    head.step(tokens, features, cache=cache)
    head.step(nodes, node_features, torch.tensor([[4, 4, 5, 5]]), tree([-1, -1, 0, 1], 4), cache)
    paths = torch.tensor([[0, 2], [1, 3]])
    index = torch.cat([torch.arange(4).expand(2, 4), 4 + paths], 1)
    cache.gather(index)
    assert cache.length == 6
    reference = head.new_cache()
    head.step(tokens, features, cache=reference)
    chosen = nodes.gather(1, paths), node_features.gather(1, paths[..., None].expand(-1, -1, H))
    head.step(*chosen, cache=reference)
    for layer in range(head.config.num_hidden_layers):
        for have, want in zip(cache.layer(layer), reference.layer(layer), strict=True):
            torch.testing.assert_close(have, want, **CLOSE)
    more = inputs(2, 1, seed=6)
    torch.testing.assert_close(head.step(*more, cache=cache), head.step(*more, cache=reference), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
def test_both_attention_functions_agree(algorithm: str) -> None:
    fused, plain = make(algorithm), make(algorithm, attn_implementation="eager")
    tokens, features = inputs(2, 6)
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[0, :2] = 0
    boolean = tree([-1, -1, 0, 1, 2, 2], 0)
    additive = torch.zeros(boolean.shape).masked_fill(~boolean, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 0, 1, 1, 2, 2]])
    for given in ((None, None), (None, padding), (positions, boolean), (positions, additive)):
        one, other = fused.step(tokens, features, *given), plain.step(tokens, features, *given)
        real = slice(2, None) if given[1] is padding else slice(None)
        torch.testing.assert_close(one[:, real], other[:, real], **CLOSE)


@torch.no_grad()
def test_select_rows(head: EagleHead) -> None:
    tokens, features = inputs(3, 4)
    cache, picked = head.new_cache(), torch.tensor([2, 0, 0])
    head.step(tokens, features, cache=cache)
    cache.select_rows(picked)
    more = inputs(3, 1, seed=6)
    fresh = head.new_cache()
    head.step(tokens[picked], features[picked], cache=fresh)
    torch.testing.assert_close(head.step(*more, cache=cache), head.step(*more, cache=fresh), **CLOSE)


def test_cache_refuses_nonsense() -> None:
    cache = HeadCache()
    key = torch.zeros(2, 1, 3, 4)
    cache.append(0, key, key)
    cache.advance(3)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(4)
    with pytest.raises(ValueError, match="outside"):
        cache.gather(torch.tensor([[0, 3], [0, 1]]))
    with pytest.raises(ValueError, match="batch"):
        cache.gather(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 rows and was given 1"):
        cache.append(0, key[:1], key[:1])
    assert cache.length == 3


@torch.no_grad()
def test_a_copied_cache_is_independent() -> None:
    head = make()
    tokens, features = inputs(1, 4)
    cache = head.new_cache()
    head.step(tokens, features, cache=cache)
    other = copy.deepcopy(cache)
    head.step(*inputs(1, 3, seed=1), cache=other)
    more = inputs(1, 1, seed=6)
    fresh = head.new_cache()
    head.step(tokens, features, cache=fresh)
    assert torch.equal(head.step(*more, cache=cache), head.step(*more, cache=fresh))


@torch.no_grad()
def test_contexts_far_beyond_the_trained_length() -> None:
    """With rotary angles computed on the fly, shifting all positions changes nothing, however far."""
    head = make(max_position_embeddings=8)
    tokens, features = inputs(1, 20)
    near = head.step(tokens, features)
    far = head.step(tokens, features, torch.arange(4000, 4020)[None])
    assert not torch.equal(near, far)
    torch.testing.assert_close(near, far, atol=2e-3, rtol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_window_counts_positions_not_entries(attention: str) -> None:
    """In a tree siblings share a position: the window reaches equally far back from each of them."""
    head = make(sliding_window=3, attn_implementation=attention)
    plain = copy.deepcopy(head)
    plain.config.sliding_window = None
    tokens, features = inputs(1, 5)
    nodes, node_features = inputs(1, 4, seed=4)
    parents, positions = [-1, -1, 1, 2], torch.tensor([[5, 5, 6, 7]])
    caches = head.new_cache(), plain.new_cache()
    near = (torch.arange(5)[None] > torch.arange(5)[:, None] - 3).tril()
    whole = head.step(tokens, features, cache=caches[0])
    explicit = plain.step(tokens, features, torch.arange(5)[None], near[None, None], caches[1])
    torch.testing.assert_close(whole, explicit, **CLOSE)
    everywhere = torch.cat([torch.arange(5), positions[0]])
    mask = tree(parents, 5)
    windowed = mask & (everywhere[None] > positions[0][:, None] - 3)
    caches[0].gather(torch.arange(5)[None])
    grown = head.step(nodes, node_features, positions, mask, caches[0])
    torch.testing.assert_close(grown, plain.step(nodes, node_features, positions, windowed, caches[1]), **CLOSE)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    caches[0].crop(5)
    torch.testing.assert_close(head.step(nodes, node_features, positions, additive, caches[0]), grown, **CLOSE)
    assert not torch.allclose(grown, plain.step(nodes, node_features, positions, tree(parents, 9), caches[1]))


@torch.no_grad()
def test_gradients_flow_through_steps_with_a_cache() -> None:
    head = make()
    tokens, features = inputs(2, 4)
    with torch.enable_grad():
        cache = head.new_cache()
        y = head.step(tokens, features.requires_grad_(), cache=cache)
        y = head.step(tokens[:, :1], y[:, -1:], cache=cache)
        head.logits(y).square().mean().backward()
    assert features.grad is not None
    assert features.grad[:, 0].abs().sum() > 0  # through the cached keys and values
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in head.named_parameters() if n != "fc.weight")


# -- the vocabulary ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
@pytest.mark.parametrize("own", [True, False])
def test_a_mapped_head_scores_the_same_ids_as_the_whole_one(algorithm: str, own: bool) -> None:
    ids = torch.tensor([0, 3, 4, 17, 39])
    mapped = make(algorithm, own_lm_head=own, draft_vocab_size=5)
    mapped.d2t.copy_(ids - torch.arange(5))
    mapped.bind(mapped.borrowed.embed_tokens, mapped.borrowed.lm_head)
    _, y = inputs(2, 3)
    assert mapped.logits(y).shape == (2, 3, 5)
    assert torch.equal(mapped.target_ids(), ids)
    assert torch.equal(mapped.draft_to_target(torch.tensor([[4], [0]])), torch.tensor([[39], [0]]))
    if not own:
        normed = mapped.norm(y) if mapped.config.final_norm else y
        torch.testing.assert_close(mapped.logits(y), mapped.borrowed.lm_head(normed)[..., ids])


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"own_lm_head": True}, {"own_lm_head": False}, {"draft_vocab_size": 30}])
def test_a_slice_scores_what_the_whole_scores(fields: dict[str, Any]) -> None:
    head = make(**fields)
    if "draft_vocab_size" in fields:
        head.d2t.copy_(torch.arange(11, 41) - torch.arange(30))
    head.bind(head.borrowed.embed_tokens, nn.Linear(H, V), logit_scale=0.5, logit_softcap=4.0)
    ids = torch.tensor([40, 12, 19, 13])
    rows = head.vocabulary_slice(ids)
    _, y = inputs(1, 3)
    where = [int((head.target_ids() == i).nonzero()) for i in ids]
    torch.testing.assert_close(head.logits(y, rows), head.logits(y)[..., where])
    assert len(rows) == 4
    best = head.logits(y, rows).argmax(-1)
    assert torch.equal(head.draft_to_target(best, rows), ids[best])


@pytest.mark.parametrize("ids", [[V], [-1], [], [[1, 2]]])
def test_slices_outside_the_vocabulary_are_refused(ids: list[Any]) -> None:
    with pytest.raises(ValueError, match="slice"):
        make().vocabulary_slice(torch.tensor(ids, dtype=torch.long))


def test_slice_of_ids_the_head_cannot_score() -> None:
    head = make(draft_vocab_size=5)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        head.vocabulary_slice(torch.tensor([7]))


@torch.no_grad()
def test_scale_and_cap_of_the_target_are_the_heads_too() -> None:
    head = make(own_lm_head=False)
    _, y = inputs(1, 2)
    raw = head.logits(y)
    head.bind(head.borrowed.embed_tokens, head.borrowed.lm_head, logit_scale=0.25, logit_softcap=2.0)
    torch.testing.assert_close(head.logits(y), 2.0 * torch.tanh(raw * 0.25 / 2.0))


@torch.no_grad()
def test_padded_rows_of_the_target_are_never_scored() -> None:
    head = make(own_lm_head=False)
    head.bind(nn.Embedding(V + 7, H), nn.Linear(H, V + 7))
    assert head.logits(torch.zeros(1, 1, H)).shape[-1] == V


# -- binding -----------------------------------------------------------------------------------------------


def test_unbound_head_says_so() -> None:
    head = EagleHead(EagleHeadConfig(algorithm="eagle1", **SIZES))
    assert not head.is_bound
    with pytest.raises(ValueError, match="bind"):
        head.step(*inputs(1, 1))
    with pytest.raises(ValueError, match="bind"):
        head.logits(torch.zeros(1, 1, H))


@pytest.mark.parametrize(
    ("embedding", "lm_head", "words"),
    [
        (nn.Embedding(V - 1, H), nn.Linear(H, V), "vocabulary of 41"),
        (nn.Embedding(V + 5000, H), nn.Linear(H, V), "vocabulary of 41"),
        (nn.Embedding(V, H + 2), nn.Linear(H, V), "18 wide"),
        (nn.Embedding(V, H), nn.Linear(H + 2, V), "18 wide"),
        (nn.Embedding(V, H), nn.Linear(H, V - 1), "scores 40 ids"),
        (nn.Embedding(V, H), None, "needs one"),
    ],
)
def test_modules_that_do_not_fit_are_refused(embedding: nn.Module, lm_head: nn.Module | None, words: str) -> None:
    head = make(own_lm_head=False)
    before = head.borrowed
    with pytest.raises(ValueError, match=words):
        head.bind(embedding, lm_head)
    assert head.borrowed is before


def test_bound_modules_are_neither_registered_nor_copied() -> None:
    head = make("eagle1")
    embedding = head.borrowed.embed_tokens
    assert head.get_input_embeddings() is embedding
    assert "embed_tokens" not in dict(head.named_modules())
    assert not any("lm_head" in name or "embed" in name for name in head.state_dict())
    assert copy.deepcopy(head).get_input_embeddings() is embedding


@torch.no_grad()
def test_own_embedding_is_let_go_when_it_equals_the_targets() -> None:
    head = make(own_embedding=True)
    theirs = nn.Embedding(V, H)
    head.bind(theirs, None)
    assert head.config.own_embedding
    assert head.get_input_embeddings() is not theirs
    theirs.weight.copy_(head.embed_tokens.weight)
    head.bind(theirs, None)
    assert not head.config.own_embedding
    assert head.get_input_embeddings() is theirs
    half = make(own_embedding=True)
    coarse = nn.Embedding(V, H, dtype=torch.float16)
    coarse.weight.copy_(half.embed_tokens.weight)
    half.bind(coarse, None)
    assert half.get_input_embeddings() is coarse


@torch.no_grad()
def test_features_of_another_width_are_refused() -> None:
    head = make()
    with pytest.raises(ValueError, match="48 wide, got 47"):
        head.fuse(torch.zeros(1, 2, 47))
    with pytest.raises(ValueError, match="fuse target features first"):
        head.step(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 48))


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(1, 3), "must cover"),
        (torch.ones(1, 1, 2, 9, dtype=torch.bool), "position_ids"),
        (torch.ones(1, 1, 1, 2, dtype=torch.bool), "position_ids"),
        (torch.ones(1, 1, 2, 2, dtype=torch.long), "position_ids"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: torch.Tensor, words: str) -> None:
    head = make()
    with pytest.raises(ValueError, match=words):
        head.step(*inputs(1, 2), attention_mask=mask)


@torch.no_grad()
def test_integer_and_misshapen_4d_masks_are_refused() -> None:
    head, positions = make(), torch.arange(2)[None]
    with pytest.raises(ValueError, match="boolean"):
        head.step(*inputs(1, 2), positions, torch.ones(1, 1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="must be"):
        head.step(*inputs(1, 2), positions, torch.ones(1, 1, 1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="must cover"):
        head.step(*inputs(1, 2), positions, torch.ones(1, 1, 2, 9, dtype=torch.bool))


@torch.no_grad()
def test_forward_is_fuse_step_logits() -> None:
    head = make()
    tokens, _ = inputs(2, 3)
    features = torch.randn(2, 3, 3 * H)
    out = head(tokens, features)
    torch.testing.assert_close(out.hidden, head.step(tokens, head.fuse(features)))
    torch.testing.assert_close(out.logits, head.logits(out.hidden))


@torch.no_grad()
def test_bfloat16_head_under_a_float32_target() -> None:
    head = make(own_lm_head=False)
    wide = head.logits(head.step(*inputs(1, 4)))
    narrow = copy.deepcopy(head).to(torch.bfloat16)
    logits = narrow.logits(narrow.step(*inputs(1, 4)))
    torch.testing.assert_close(logits.float(), wide, atol=0.15, rtol=0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"algorithm": "eagle2"}, "algorithm"),
        ({"algorithm": "eagle1", "norm_before_residual": True}, "EAGLE-3"),
        ({"algorithm": "eagle1", "has_fc": False}, "fusing projection"),
        ({"algorithm": "eagle1", "target_hidden_size": 8}, "own width"),
        ({"norm_before_fc": True, "fc_norm": True}, "exclude"),
        ({"has_fc": False, "fc_norm": True}, "fusing projection"),
        ({"has_fc": False, "target_hidden_size": 8}, "as wide as"),
        ({"norm_output": True, "final_norm": False}, "final norm"),
        ({"feature_layer_ids": [1, 2], "num_features": 3}, "do not match"),
        ({"draft_vocab_size": V + 1}, "larger"),
        ({"num_attention_heads": 3}, "multiple"),
        ({"head_dim": 5}, "even"),
        ({"mask_token_id": 3}, "mask_token_id"),
        ({"sliding_window": 0}, "sliding_window"),
    ],
)
def test_contradictory_configs_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EagleHeadConfig(**(SIZES | fields))
