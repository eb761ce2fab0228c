# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch that each have their own columns: plain generation's text, and no column for other rows' length."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from architectures import LATENT
from tiny_models import head_for, noisy, prompts, tiny

import hf_polyspec
from hf_polyspec.errors import LevelError
from hf_polyspec.exactness.context import Prompt
from hf_polyspec.host import ragged_cache
from hf_polyspec.host.own_rows import plainly_padded, rows_apart
from hf_polyspec.host.ragged_cache import Regions
from hf_polyspec.host.release import cache_of, with_cache

NEW = 20
WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOWS},
    "mistral": {"sliding_window": 6},
    "gpt2": {},
    "qwen3": {"head_dim": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {},
    "deepseek_v3": LATENT,
}
CHAINS = ("suffix", "drafter", "middle over suffix", "8-bit middle over drafter", "head", "tree", "head under a middle")


def levels(target: Any, chain: str) -> tuple[list[Any], dict[str, Any]]:
    near, far = noisy(target, 0.03), noisy(target, 0.05, seed=2)
    tree = {"polyspec_tree_tokens": 6, "polyspec_tree_depth": 3, "polyspec_tree_top_k": 2}
    return {
        "suffix": ([hf_polyspec.SuffixDrafter()], {}),
        "drafter": ([far], {}),
        "middle over suffix": ([near, hf_polyspec.SuffixDrafter()], {}),
        "8-bit middle over drafter": ([hf_polyspec.quantize_model(target, bits=8), far], {}),
        "head": ([head_for(target)], {"polyspec_tree_tokens": 0}),
        "tree": ([head_for(target)], tree),
        "head under a middle": ([near, head_for(near)], tree),
    }[chain]


@contextmanager
def columns_of(model: Any) -> Iterator[list[int]]:
    """Columns that a model is fed in each of its passes."""
    fed: list[int] = []

    def look(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        fed.append(given["input_ids"].numel())

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield fed
    finally:
        hook.remove()


def both(target: Any, chain: str, batch: int = 5, **options: Any) -> tuple[torch.Tensor, Any]:
    """Plain generation's text, and the output of a chain."""
    assistants, own = levels(target, chain)
    inputs = prompts(batch, 13)
    common = {"max_new_tokens": NEW, **inputs, **options}
    torch.manual_seed(11)
    plain = target.generate(**common)
    torch.manual_seed(11)
    return plain, hf_polyspec.generate(
        target,
        assistant_models=assistants,
        num_assistant_tokens=3,
        polyspec_block_size=4,
        return_dict_in_generate=True,
        **own,
        **common,
    )


def an_end(target: Any) -> int:
    """An id that ends some rows of plain greedy generation early, and others not."""
    text = target.generate(**prompts(5, 13), max_new_tokens=NEW, do_sample=False)[:, 13:]
    ends = [int(token) for token in text[:, 4].tolist()]
    return min(ends, key=lambda token: (text == token).any(dim=1).sum().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_of_every_family_is_plain_generations(family: str) -> None:
    target = tiny(family, **FAMILIES[family])
    assert rows_apart(target)
    for sampled in (False, True):
        plain, output = both(target, "middle over suffix", do_sample=sampled, eos_token_id=an_end(target))
        assert torch.equal(output.sequences, plain)
    # So many that they are put side by side.
    plain, output = both(target, "drafter", do_sample=False, batch=18)
    assert torch.equal(output.sequences, plain)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("windows", [False, True])
def test_the_text_of_every_chain_is_plain_generations(chain: str, windows: bool) -> None:
    target = tiny("gemma3_text", **FAMILIES["gemma3_text"]) if windows else tiny("llama")
    for sampled in (False, True):
        plain, output = both(target, chain, do_sample=sampled, eos_token_id=an_end(target))
        assert torch.equal(output.sequences, plain)
    # What drafts without a model says of random text may all be wrong, and so may an untrained head.
    assert output.polyspec.levels[1].accepted > 0 or chain not in ("drafter", "8-bit middle over drafter")


def run(target: Any, assistants: list[Any], **options: Any) -> Any:
    common = {"max_new_tokens": NEW, "do_sample": False, "num_assistant_tokens": 3, "return_dict_in_generate": True}
    return hf_polyspec.generate(target, assistant_models=assistants, **{**common, **options})


@pytest.mark.parametrize("ends", [False, True])
def test_no_column_is_fed_for_another_rows_length_or_after_an_end(ends: bool) -> None:
    target = tiny("llama")
    drafter, end = noisy(target, 0.03), an_end(target) if ends else None
    inputs = prompts(6, 40)
    real, columns = int(inputs["attention_mask"].sum()), inputs["input_ids"].numel()
    assert real < 0.85 * columns
    run(target, [drafter], **inputs, max_new_tokens=2)  # tries the models, once
    with columns_of(target) as fed:
        output = run(target, [drafter], **inputs, eos_token_id=end)
    top = output.polyspec.levels[0]
    # The prompt, and in every later round of a row one column and its draft.
    needed = real + top.drafted + top.rounds - 6
    assert needed <= sum(fed) <= 1.05 * needed
    if ends:
        assert (output.sequences[:, -3:] == 0).all(dim=1).sum() >= 2
    # What the cache that is returned lacks of the rows that ended is read when it is looked at.
    with columns_of(target) as fed:
        assert cache_of(output).get_seq_length() == output.sequences.shape[1] - 1
    assert len(fed) == ends
    assert sum(fed) < 6 * NEW


@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
@pytest.mark.parametrize("chain", ["8-bit middle over drafter", "tree", "middle over suffix"])
@pytest.mark.parametrize("rows", [1, 5])
def test_layers_with_a_window_hold_little_more_than_it(
    family: str, chain: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ragged_cache, "_MARGIN", 4)
    monkeypatch.setattr(ragged_cache, "_MORE_ROOM", 4)
    target = tiny(family, **FAMILIES[family])
    rooms: dict[int | None, int] = {}
    reserve = Regions.reserve

    def reserved(self: Regions, *given: int) -> tuple[int, int, int]:
        found = reserve(self, *given)
        rooms[self.window] = max(rooms.get(self.window, 0), *self.rooms)
        return found

    monkeypatch.setattr(Regions, "reserve", reserved)
    for sampled in (False, True):
        plain, output = both(target, chain, rows, do_sample=sampled, max_new_tokens=80)
        assert torch.equal(output.sequences, plain)
    # The window, the margin, the longest pass (a prompt of 13 and a draft) and the room that is left free, in whole
    # stretches; of whole texts there are 93 columns.
    assert rooms[6] <= 48 < 93 <= rooms[None]


def test_a_head_reads_no_more_than_its_target_was_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny("llama")
    head = head_for(target)
    fused: list[int] = []
    genuine = type(head).fuse

    def fuse(self: Any, states: torch.Tensor) -> torch.Tensor:
        fused.append(states.shape[0] * states.shape[1])
        return genuine(self, states)

    monkeypatch.setattr(type(head), "fuse", fuse)
    with columns_of(target) as fed:
        run(target, [head], **prompts(6, 40), polyspec_tree_tokens=0)
    assert 0.8 * sum(fed) < sum(fused) <= sum(fed)


def test_equal_prompts_are_read_once() -> None:
    target = tiny("llama")
    inputs = prompts(1, 30)
    rows_apart(target)
    options = {**inputs, "num_return_sequences": 5, "do_sample": True}
    with columns_of(target) as fed:
        torch.manual_seed(3)
        output = run(target, [hf_polyspec.SuffixDrafter()], **options)
    assert 30 <= fed[0] < 40  # with a draft, the same in each row
    torch.manual_seed(3)
    assert torch.equal(output.sequences, target.generate(**options, max_new_tokens=NEW))
    assert len({tuple(row) for row in output.sequences.tolist()}) > 1


def test_the_cache_that_is_handed_back_goes_on_as_plain_generations_does() -> None:
    target = tiny("llama")
    inputs = prompts(4, 13)
    output = run(target, [noisy(target, 0.03)], **inputs, eos_token_id=an_end(target))
    text = output.sequences
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(text[:, 13:])], dim=1)
    cached = output.past_key_values if hasattr(output, "past_key_values") else output.cache
    again = target.generate(text, attention_mask=mask, max_new_tokens=5, do_sample=False)
    onward = target.generate(text, attention_mask=mask, max_new_tokens=5, do_sample=False, **with_cache(target, cached))
    assert torch.equal(again, onward)


def test_streamers_see_the_steps_of_the_batch_in_order() -> None:
    target = tiny("llama")

    class Steps:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append([])

    steps = Steps()
    inputs = prompts(4, 13)
    output = run(target, [noisy(target, 0.03)], **inputs, streamer=steps, eos_token_id=an_end(target))
    assert steps.seen[1:-1] == output.sequences[:, 13:].T.tolist()


def test_threads_share_a_model() -> None:
    target, drafter = tiny("llama"), noisy(tiny("llama"), 0.03)
    inputs = [prompts(3 + n, 13, seed=n) for n in range(4)]
    plain = [target.generate(**one, max_new_tokens=NEW, do_sample=False) for one in inputs]
    found: dict[int, torch.Tensor] = {}

    def work(n: int) -> None:
        # Plain generation beside chains: its attention is the usual one while others have their own.
        for _ in range(3):
            found[n] = (
                run(target, [drafter], **inputs[n]).sequences
                if n % 2
                else target.generate(**inputs[n], max_new_tokens=NEW, do_sample=False)
            )

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], plain[n]) for n in range(4))
    assert target.config._attn_implementation == "sdpa"


def test_a_pass_that_fails_leaves_the_config_as_it_was() -> None:
    target = tiny("llama")
    rows_apart(target)

    def fail(*_: Any) -> None:
        assert target.config._attn_implementation != "sdpa"  # so that the test tests something
        raise RuntimeError("no more")

    hook = target.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(LevelError, match="no more"):
        run(target, [hf_polyspec.SuffixDrafter()], **prompts(3))
    hook.remove()
    assert target.config._attn_implementation == "sdpa"
    plain = target.generate(**prompts(3), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(run(target, [hf_polyspec.SuffixDrafter()], **prompts(3)).sequences, plain)


@pytest.mark.parametrize("family", ["bloom", "mpt", "gemma2"])
def test_models_that_go_past_the_interface_stay_in_a_rectangle(family: str) -> None:
    target = tiny(family, attention="eager")
    assert not rows_apart(target)
    plain = target.generate(**prompts(3), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(run(target, [hf_polyspec.SuffixDrafter()], **prompts(3)).sequences, plain)


def test_what_attention_a_model_has_is_asked_every_time() -> None:
    target = tiny("llama")
    assert rows_apart(target)
    target.set_attn_implementation("eager")
    assert not rows_apart(target)
    target.set_attn_implementation("sdpa")
    assert rows_apart(target)
    target.train()
    assert not rows_apart(target)


def test_prompts_with_holes_stay_in_a_rectangle() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    for rows, plain in (
        ([[0, 0, 1, 1], [1, 1, 1, 1]], True),
        ([[0, 1, 0, 1], [1, 1, 1, 1]], False),
        ([[1, 1, 1, 0], [1, 1, 1, 1]], False),
    ):
        for dtype in (torch.long, torch.bool):
            assert plainly_padded(Prompt(4, torch.tensor(rows).to(dtype), ids)) is plain
    assert plainly_padded(Prompt(4, None, ids))
    assert not plainly_padded(Prompt(4, None, ids, hidden=1))
    assert not plainly_padded(Prompt(4, None, ids, embeds=torch.zeros(2, 4, 8)))
