# SPDX-License-Identifier: Apache-2.0
"""A copy of the target takes its keys and values: the text stays the target's, and the copy reads no prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tiny_models import head_for, noisy, prompts
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hf_polyspec import SuffixDrafter
from hf_polyspec.control import OnlineControl
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.generation.doors import generate
from hf_polyspec.host.lending import WORTH, borrow, is_copy
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels.block import Block
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.verifier import Verifier
from hf_polyspec.quantization import quantize_model
from hf_polyspec.telemetry.counters import LevelStats

Tiny = Callable[..., PreTrainedModel]
LONG = prompts(1, WORTH + 8)
ROWS = prompts(3, WORTH + 8)


@pytest.fixture(scope="module")
def pair(tiny: Tiny) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target and its copy in 4 bits, which often disagrees."""
    target = tiny("llama", max_position_embeddings=256)
    return target, quantize_model(copy.deepcopy(target), 4, group_size=16)


@contextmanager
def fed(model: nn.Module) -> Iterator[list[int]]:
    """Columns of every pass of a model."""
    seen: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    try:
        yield seen
    finally:
        hook.remove()


def text(target: PreTrainedModel, given: dict[str, Tensor], chain: list[Any] | None = None, **options: Any) -> Any:
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    if chain is None:
        return target.generate(**given, **options)
    return generate(target, **given, assistant_models=chain, **options)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_is_a_copy(tiny: Tiny, bits: int) -> None:
    target = tiny("llama", attention_bias=True)
    middle = quantize_model(copy.deepcopy(target), bits, group_size=16 if bits == 4 else -1)
    assert is_copy(middle, target)
    assert is_copy(copy.deepcopy(target), target)
    assert not is_copy(target, target)


@pytest.mark.parametrize("change", ["noise", "norm", "embedding", "turns", "layers", "family", "dtype"])
def test_what_is_no_copy(tiny: Tiny, change: str) -> None:
    target = tiny("llama")
    other = copy.deepcopy(target)
    with torch.no_grad():
        if change == "noise":
            other = noisy(target, 0.03)
        elif change == "norm":
            other.model.layers[1].input_layernorm.weight[3] += 0.01
        elif change == "embedding":
            other.get_input_embeddings().weight[-1, 0] += 0.01
        elif change == "turns":
            other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5000.0}
        elif change == "layers":
            other = tiny("llama", num_hidden_layers=1)
        elif change == "family":
            other = tiny("mistral")
        else:
            other = other.to(torch.bfloat16)
    assert not is_copy(other, target)


@torch.no_grad()
@pytest.mark.parametrize("place", ["copy", "target", "another target", "another norm", "config"])
def test_a_copy_that_was_one_is_looked_at_again(tiny: Tiny, place: str) -> None:
    target = tiny("llama")
    other = copy.deepcopy(target)
    assert is_copy(other, target)
    assert is_copy(other, target)
    if place == "another target":
        target = noisy(target)
    elif place == "another norm":
        target.model.norm.weight = nn.Parameter(2 * target.model.norm.weight)
    elif place == "config":
        target.config.rms_norm_eps = 0.5
    else:
        (other if place == "copy" else target).model.layers[1].input_layernorm.weight[3] += 0.01
    assert not is_copy(other, target)


@torch.no_grad()
def test_columns_are_those_of_the_lender(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Rows of different length, of which the borrower has read different numbers already."""
    target, middle = pair
    lender, borrower = ModelRunner(target, "the target"), ModelRunner(middle, "the middle")
    rows = [list(range(3, 3 + WORTH + 10)), list(range(3, 3 + WORTH + 4))]
    places = torch.arange(WORTH + 10)[None].expand(2, -1)
    prompt = Prompt(1, None, places[:, :1])
    lender.run(Context(rows, prompt), [[], []], LevelStats("target", 0))
    borrower.run(Context([rows[0][:5], rows[1][:3]], prompt), [[], []], LevelStats("middle", 1))
    own = [layer.keys.clone() for layer in borrower.cache.layers]
    borrow(borrower, lender, [[*rows[0], 9], [*rows[1], 8]])
    assert borrower.memo == [rows[0][: 5 + WORTH + 1], rows[1]]
    width, lent = borrower.cache.length, lender.cache.length
    assert width == 5 + WORTH + 1
    for layer, given, before in zip(borrower.cache.layers, lender.cache.layers, own, strict=True):
        assert torch.equal(layer.keys[0, :, :5], before[0])
        assert torch.equal(layer.keys[0, :, 5:], given.keys[0, :, 5:width])
        assert torch.equal(layer.values[0, :, 5:], given.values[0, :, 5:width])
        first = lent - len(rows[1])
        assert torch.equal(layer.values[1, :, -WORTH - 1 :], given.values[1, :, first + 3 :])


@pytest.mark.parametrize("given", [LONG, ROWS])
def test_the_copy_reads_no_prompt(pair: tuple[PreTrainedModel, PreTrainedModel], given: dict[str, Tensor]) -> None:
    target, middle = pair
    with fed(middle) as below, fed(target) as above:
        found = text(target, given, [middle, SuffixDrafter()], return_dict_in_generate=True)
    assert torch.equal(found.sequences, text(target, given))
    said = f"takes keys and values of {WORTH + 8} tokens from the target"
    assert [note for note in found.polyspec.levels[1].notes if note.startswith("takes")] == [said]
    assert below
    assert max(below) < WORTH
    assert [columns for columns in above if columns >= WORTH] == [int(given["attention_mask"].sum())]
    assert set(found.polyspec.token_levels[0][:1]) == {0}, "the pass that reads the prompt gives the first token"


def test_a_short_prompt_is_read(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, middle = pair
    given = prompts(1, WORTH - 4)
    with fed(middle) as below:
        found = text(target, given, [middle, SuffixDrafter()])
    assert torch.equal(found, text(target, given))
    assert max(below) >= WORTH - 4


def test_a_copy_that_drafts(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, middle = pair
    with fed(middle) as below:
        found = text(target, ROWS, [middle])
    assert torch.equal(found, text(target, ROWS))
    assert max(below) < WORTH


def test_prompts_in_pieces(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, middle = pair
    given = prompts(1, 2 * WORTH)
    with fed(middle) as below, fed(target) as above:
        found = text(target, given, [middle, SuffixDrafter()], prefill_chunk_size=20)
    assert torch.equal(found, text(target, given))
    assert sum(below) < WORTH + sum(above)
    assert above[:3] == [20, 20, 20]
    assert max(below) < WORTH


def test_hidden_states_are_those_of_plain_generation(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, middle = pair
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    found = text(target, LONG, [middle, SuffixDrafter()], **options)
    plain = text(target, LONG, **options)
    assert torch.equal(found.sequences, plain.sequences)
    for ours, theirs in zip(found.hidden_states[0], plain.hidden_states[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_text_that_is_continued(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, middle = pair
    caches = DynamicCache(config=target.config), DynamicCache(config=target.config)
    for cache in caches:
        with torch.no_grad():
            target(LONG["input_ids"][:, : WORTH + 4], **{GENERATION_CACHE: cache})
    with fed(middle) as below:
        found = text(target, LONG, [middle, SuffixDrafter()], **{GENERATION_CACHE: caches[0]})
    assert torch.equal(found, text(target, LONG, **{GENERATION_CACHE: caches[1]}))
    assert max(below) < WORTH


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle1"])
def test_a_head_under_a_copy_sees_the_prompt(
    pair: tuple[PreTrainedModel, PreTrainedModel], algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, middle = pair
    begins: list[int] = []
    known = EagleDrafter._known_pairs

    def seen(self: EagleDrafter, context: Context) -> Any:
        pairs = known(self, context)
        begins.extend(row.begin for row in pairs if row.count)
        return pairs

    monkeypatch.setattr(EagleDrafter, "_known_pairs", seen)
    with fed(middle) as below:
        found = text(target, ROWS, [middle, head_for(target, algorithm)])
    assert torch.equal(found, text(target, ROWS))
    assert max(below) < WORTH
    assert begins
    assert max(begins) <= int((ROWS["attention_mask"] == 0).sum(1).max())


def test_rows_that_run_ahead_go_on_being_drafted_for(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row's text is known to the drafter, so it comes to be longer than the others by more than is lent at once."""
    target, middle = pair
    options = {"max_new_tokens": 150, "eos_token_id": None}
    plain = text(target, ROWS, **options)
    lengths: list[list[int]] = []
    answers: list[bool] = []
    reads = Verifier.reads_for_others

    def listening(level: Verifier, context: Context, *active: Any) -> bool:
        answer = reads(level, context, *active)
        if level.index == 0:
            lengths.append([len(ids) for ids in context.ids])
            answers.append(answer)
        return answer

    monkeypatch.setattr(Verifier, "reads_for_others", listening)
    chain = [middle, SuffixDrafter(corpus=[plain[0].tolist()], min_match=6, min_probability=0.0)]
    assert torch.equal(text(target, ROWS, chain, polyspec_direct_tokens=1, **options), plain)
    assert max(row[0] - min(row) for row in lengths) > WORTH
    assert {len(row) for n, row in enumerate(lengths) if answers[n]} == {3}
    assert all(answer == (max(row) == ROWS["input_ids"].shape[1]) for answer, row in zip(answers, lengths, strict=True))


@pytest.mark.parametrize("copied", [True, False])
def test_an_online_control_begins_after_the_pass_that_reads_for_others(
    pair: tuple[PreTrainedModel, PreTrainedModel], copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, middle = pair
    asked: list[int] = []
    before = OnlineControl.before

    def listening(control: OnlineControl, context: Context, limits: list[int]) -> None:
        asked.append(len(context.ids[0]))
        before(control, context, limits)

    monkeypatch.setattr(OnlineControl, "before", listening)
    chain = [middle if copied else noisy(target, 0.01), SuffixDrafter()]
    found = text(target, LONG, chain, polyspec_control="online")
    assert torch.equal(found, text(target, LONG))
    assert asked[0] == LONG["input_ids"].shape[1] + copied


SAMPLES, ALARM = 6000, 1e-5


def _p_value(target: PreTrainedModel, chain: list[Any]) -> float:
    """Of the second new token of many samples under the target's law; the last but one may be the middle's."""
    ids = LONG["input_ids"] % 12
    torch.manual_seed(7)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "num_return_sequences": SAMPLES // 10}
    options["polyspec_verification"] = "block"
    found = torch.cat([text(target, {"input_ids": ids}, chain, **options)[:, -2] for _ in range(10)])
    with torch.no_grad():
        first = target(ids).logits[0, -1].softmax(-1)
        after = target(torch.cat([ids.expand(12, -1), torch.arange(12)[:, None]], 1)).logits[:, -1].softmax(-1)
    law = (first @ after).double()
    return float(chisquare(torch.bincount(found, minlength=12).numpy(), (law / law.sum() * SAMPLES).numpy()).pvalue)


@pytest.mark.parametrize("honest", [True, False])
def test_samples_follow_the_target(tiny: Tiny, honest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """False alarm once in 100 000 runs; a middle that hands up another law than it drew from is seen."""
    target = tiny("llama", vocab_size=12, initializer_range=0.15)
    middle = quantize_model(copy.deepcopy(target), 2, group_size=16)
    stack = Block._stacked
    if not honest:

        def dishonest(block: Block) -> Tensor | None:
            laws = stack(block)
            return None if laws is None else (laws + 1 / 12) / 2

        monkeypatch.setattr(Block, "_stacked", dishonest)
    with fed(middle) as below:
        found = _p_value(target, [middle, SuffixDrafter()])
    # In each of the ten calls every row is read one token behind the prompt; none of them reads the prompt.
    assert [columns for columns in below if columns >= WORTH] == [SAMPLES // 10] * 10
    assert (found > ALARM) is honest
