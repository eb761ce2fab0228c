# SPDX-License-Identifier: Apache-2.0
"""Levels of every kind under one target: other dtypes, quantised copies, padded vocabularies, long chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, noisy, prompts, tiny

import hf_polyspec

NEW = 24


def padded(model: Any, rows: int) -> Any:
    """A copy whose vocabulary has another number of rows; rows beyond the original's would win every argmax."""
    other = tiny("llama", vocab_size=rows)
    state = model.state_dict()
    shared = min(rows, VOCABULARY)
    for name, value in other.state_dict().items():
        if value.shape == state[name].shape:
            value.copy_(state[name])
        else:
            value[:shared] = state[name][:shared]
            value[shared:] = 5 * value[:1].abs()
    return noisy(other, 0.02)


def run(target: Any, assistants: list[Any], batch: int, **options: Any) -> Any:
    return hf_polyspec.generate(
        target,
        **prompts(batch),
        assistant_models=assistants,
        max_new_tokens=NEW,
        polyspec_block_size=4,
        num_assistant_tokens=3,
        return_dict_in_generate=True,
        **options,
    )


@pytest.fixture
def chains(target: Any, middle: Any, drafter: Any) -> dict[str, list[Any]]:
    def bf16(model: Any) -> Any:
        return noisy(model, 0.0).bfloat16()

    eight_bits = hf_polyspec.quantize_model(target, bits=8)
    return {
        "bfloat16 levels": [bf16(middle), bf16(drafter)],
        "float64 middle": [noisy(middle, 0.0).double(), drafter],
        "8-bit middle": [eight_bits, drafter],
        "8-bit middle over a suffix drafter": [eight_bits, hf_polyspec.SuffixDrafter()],
        "larger vocabulary": [padded(middle, VOCABULARY + 4), padded(drafter, VOCABULARY + 6)],
        "smaller vocabulary": [padded(middle, VOCABULARY - 3), padded(drafter, VOCABULARY - 5)],
        "the target below itself": [target, target],
        "five levels": [middle, noisy(middle, 0.01), noisy(drafter, 0.01), drafter],
    }


NAMES = [
    "bfloat16 levels",
    "float64 middle",
    "8-bit middle",
    "8-bit middle over a suffix drafter",
    "larger vocabulary",
    "smaller vocabulary",
    "the target below itself",
    "five levels",
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_equality(target: Any, chains: dict[str, list[Any]], name: str, batch: int) -> None:
    plain = target.generate(**prompts(batch), max_new_tokens=NEW, do_sample=False)
    output = run(target, chains[name], batch, do_sample=False)
    assert torch.equal(output.sequences, plain)
    levels = output.polyspec.levels
    assert len(levels) == 1 + len(chains[name])
    assert levels[0].accepted > 0
    assert all(level.rounds > 0 for level in levels[:-1])


@pytest.mark.parametrize("name", NAMES)
def test_sampling_stays_inside_the_targets_vocabulary(target: Any, chains: dict[str, list[Any]], name: str) -> None:
    torch.manual_seed(0)
    output = run(target, chains[name], 3, do_sample=True, top_k=20)
    assert output.sequences.shape == (3, prompts(3)["input_ids"].shape[1] + NEW)
    assert int(output.sequences.max()) < VOCABULARY
    assert output.polyspec.levels[0].accepted > 0


def test_the_target_below_itself_is_never_rejected(target: Any) -> None:
    level = run(target, [target], 1, do_sample=False).polyspec.levels[0]
    assert level.accepted == level.drafted > 0
    assert level.recovered == 0


def test_an_id_that_the_target_does_not_have_is_an_error(target: Any, middle: Any) -> None:
    with pytest.raises(hf_polyspec.LevelError, match="the target failed: index out of range"):
        hf_polyspec.generate(target, torch.tensor([[1, VOCABULARY + 1]]), assistant_models=[middle], max_new_tokens=4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "the target below itself"])
def test_the_end_of_memory_is_raised_as_it_is(
    target: Any, chains: dict[str, list[Any]], name: str, error: type[Exception]
) -> None:
    """Callers look for batch sizes by catching it; the level is named in a note, and the next call goes on."""
    plain = target.generate(**prompts(1), max_new_tokens=NEW, do_sample=False)
    text = "CUDA out of memory. Tried to allocate 2.00 GiB."
    levels = [(target, "the target"), *((one, f"assistant_models[{i}]") for i, one in enumerate(chains[name]))]
    for level, role in levels:
        if not isinstance(level, torch.nn.Module):
            continue
        part = next(layer for layer in level.modules() if isinstance(layer, torch.nn.LayerNorm | torch.nn.Embedding))

        def fail(*_: Any) -> None:
            raise error(text)

        hook = part.register_forward_pre_hook(fail)
        with pytest.raises(error, match=text) as caught:
            run(target, chains[name], 1, do_sample=False)
        hook.remove()
        assert type(caught.value) is error
        assert [note for note in caught.value.__notes__ if role in note], caught.value.__notes__
    assert torch.equal(run(target, chains[name], 1, do_sample=False).sequences, plain)
