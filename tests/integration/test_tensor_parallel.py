# SPDX-License-Identifier: Apache-2.0
"""A target that two processes split between them (gloo, on the CPU): what they write, decide, and say when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import split_target
import torch
from ranks import together
from tiny_models import noisy, tiny
from transformers import PreTrainedModel

import hf_polyspec

# Whichever test comes first waits for all that the processes do (`ranks.together` has a limit of its own).
pytestmark = pytest.mark.timeout(960)
SCRIPT = Path(split_target.__file__)
GREEDY = (
    "plain",
    "a small model",
    "suffix",
    "int8 over suffix",
    "int4 over a small model",
    "a head",
    "a head in trees",
    "int8 over a head and suffix",
    "an early exit, which is split",
    "a split middle over suffix",
    "online",
    "auto",
    "a block-diffusion drafter",
    "and under a split middle",
    "mtp",
)
LONGER = ("online, int8 over a head", "online, split over suffix", "online, split over split")
DRAWN = (
    "token",
    "block",
    "a middle that draws",
    "a split middle that draws",
    "a split drafter",
    "a drawn tree",
    "in order",
    "a bias budget",
    "a seed",
)


@pytest.fixture(scope="module")
def unsplit() -> PreTrainedModel:
    return tiny("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)


@pytest.fixture(scope="module")
def folder(unsplit: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("split")
    unsplit.save_pretrained(place / "target")
    noisy(unsplit, 0.02).save_pretrained(place / "alike")
    tiny("llama", num_hidden_layers=1, seed=4).save_pretrained(place / "small")
    tiny("llama", hidden_size=36, num_attention_heads=9, num_key_value_heads=3).save_pretrained(place / "uneven")
    return place


@pytest.fixture(scope="module")
def text(unsplit: PreTrainedModel) -> list[list[int]]:
    """Plain generation's, by one process."""
    rows: list[list[int]] = unsplit.generate(**split_target.PROMPTS, **split_target.PLAIN).tolist()
    return rows


@pytest.fixture(scope="module")
def changed_text(unsplit: PreTrainedModel) -> list[list[int]]:
    """The same, with other weights."""
    changed = noisy(unsplit, 0.0)
    split_target.change(changed)
    rows: list[list[int]] = changed.generate(**split_target.PROMPTS, **split_target.PLAIN).tolist()
    return rows


@pytest.fixture(scope="module")
def longer_text(unsplit: PreTrainedModel) -> list[list[int]]:
    rows: list[list[int]] = unsplit.generate(
        **split_target.PROMPTS, **{**split_target.PLAIN, "max_new_tokens": 60}
    ).tolist()
    return rows


@pytest.fixture(scope="module")
def drawn(unsplit: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """What one process writes with each chain whose levels draw, and the number it draws then."""
    calls = split_target.drawn_chains(str(folder), split_target.Texts(unsplit), split_target.whole)
    found: dict[str, Any] = {}
    for name, call in calls.items():
        torch.manual_seed(split_target.SEED)
        found[name] = call().tolist(), int(torch.randint(1 << 30, ()))
    return found


@pytest.fixture(scope="module")
def seen_by_each(folder: Path) -> list[dict[str, Any]]:
    """What each process saw."""
    return together(SCRIPT, folder, "everything")


@pytest.mark.parametrize("name", GREEDY)
def test_every_chain_writes_the_unsplit_models_text(seen_by_each: list[dict[str, Any]], text: Any, name: str) -> None:
    assert seen_by_each[0][name] == text
    assert seen_by_each[1][name] == text


@pytest.mark.parametrize("name", LONGER)
def test_one_control_steers_levels_that_processes_share(
    seen_by_each: list[dict[str, Any]], longer_text: Any, name: str
) -> None:
    assert [seen[name] for seen in seen_by_each] == [longer_text, longer_text]


@pytest.mark.parametrize("name", DRAWN)
def test_where_levels_draw_the_first_process_draws_for_all(
    seen_by_each: list[dict[str, Any]], drawn: dict[str, Any], name: str
) -> None:
    text, following = drawn[name]
    for seen in seen_by_each:  # of which each began with a seed of its own
        assert seen[name] == text
        assert seen[f"the next number after {name}"] == following


def test_no_law_in_one_process_is_an_error_in_all(seen_by_each: list[dict[str, Any]], text: Any) -> None:
    left, right = (seen["nothing to draw from"] for seen in seen_by_each)
    assert left.startswith("RuntimeError: probability tensor")  # as plain generation says it
    assert right.startswith("LevelError: the target: in process 0, probability tensor")
    assert [seen["well again"] for seen in seen_by_each] == [text, text]


def test_what_pays_is_measured_together_and_decided_by_the_first(
    seen_by_each: list[dict[str, Any]], unsplit: PreTrainedModel, changed_text: Any
) -> None:
    torch.manual_seed(split_target.SEED)
    wanted = unsplit.generate(**split_target.PROMPTS, **split_target.SAMPLED).tolist()
    first, second = seen_by_each
    assert first["auto, sampled"] == second["auto, sampled"] == wanted
    assert first["auto, changed"] == second["auto, changed"] == changed_text != first["auto"]
    assert first["auto, where no token pays"] == second["auto, where no token pays"] == changed_text
    assert first["auto in one row"] == second["auto in one row"]
    text, drafted = first["auto in one row"]
    # What process 0 cuts from a draft is cut before the others are told of it.
    assert first["auto in one row, where no token pays"] == second["auto in one row, where no token pays"] == [text, 0]
    assert drafted > 0
    assert first["lines"] == second["lines"]
    assert "suffix" in first["lines"][0]
    assert (first["profiles"], second["profiles"]) == (1, 0)


def test_layers_borrow_the_weights_of_now(seen_by_each: list[dict[str, Any]], changed_text: Any) -> None:
    assert [seen["mtp, changed"] for seen in seen_by_each] == [changed_text, changed_text]


def test_sampling_goes_by_the_first_process_generator(
    seen_by_each: list[dict[str, Any]], unsplit: PreTrainedModel
) -> None:
    torch.manual_seed(7)
    wanted = unsplit.generate(**split_target.PROMPTS, **split_target.SAMPLED).tolist()
    after = int(torch.randint(1 << 30, ()))
    for seen in seen_by_each:
        assert seen["sampled, one seed"] == wanted
        assert seen["sampled, other seeds"] == wanted  # of which process 0's was the same
        assert seen["a seed of the call's own"] == wanted
        assert seen["the next number"] == after


def test_all_processes_have_the_statistics_of_all_levels(seen_by_each: list[dict[str, Any]]) -> None:
    assert seen_by_each[0]["statistics"] == seen_by_each[1]["statistics"]
    tokens, levels = seen_by_each[0]["statistics"]
    assert tokens == 12 * 14
    assert len(levels) == 3
    assert all(passes for _, passes in levels)


def test_clocks_and_criteria_are_the_first_process_s(seen_by_each: list[dict[str, Any]], text: Any) -> None:
    for seen in seen_by_each:
        assert seen["a criterion"] == [row[: 9 + 5] for row in text]
        assert seen["no time"] == [row[: 9 + 1] for row in text]


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "other prompts": "input_ids of process 1 differs from that of process 0",
        "other lengths": "max_length of process 1 differs",
        "refused in one": "assistant_models[0] is 'no such thing'",
        "an engine": "the target's weights are shared by processes, in which an Engine does not keep its rows in step",
        "uneven": "9 attention heads and 3 key-value heads, which 2 processes cannot share evenly",
        "auto, other prompts": "input_ids of process 1 differs from that of process 0",
        "auto in one": "assistant_models of process 1 differs from that of process 0",
    }.items(),
)
def test_what_cannot_be_is_refused_in_all(seen_by_each: list[dict[str, Any]], name: str, words: str) -> None:
    for seen in seen_by_each:
        assert seen[name].startswith("ValueError: ")
        assert words in seen[name]
        assert seen[name].count(". ") == 0
    if name == "refused in one":
        assert seen_by_each[0][name].startswith("ValueError: process 1 of 2 refused this call")


def test_what_fails_in_one_fails_in_all_and_the_next_call_is_well(
    seen_by_each: list[dict[str, Any]], text: Any
) -> None:
    for seen in seen_by_each:
        assert "assistant_models[0] (failing) failed to propose: out of luck" in seen["a level that fails"]
        assert seen["parted ways"].startswith("LevelError: the target: ")
        assert "process 1 holds other ids than process 0" in seen["parted ways"]
        assert seen["all is well"] == text


def test_who_is_left_when_one_process_is_killed_is_told(seen_by_each: list[dict[str, Any]]) -> None:
    left, gone = seen_by_each
    assert left["killed"].startswith("LevelError: the target")
    assert "killed" not in gone


def test_weights_that_zero_3_has_partitioned_are_refused(unsplit: PreTrainedModel) -> None:
    """As deepspeed 0.19 leaves them (seen in two processes): gathered, they are partitioned again by the hooks of the
    first pass, in which every process waits for all others."""
    other = noisy(unsplit, 0.0)
    weight = other.lm_head.weight
    weight.ds_id, weight.ds_numel, weight.partition = 3, weight.numel(), lambda *_: None
    weight.partition.__module__ = "deepspeed.runtime.zero.partition_parameters"
    levels = {**split_target.PROMPTS, **split_target.PLAIN, "assistant_models": [unsplit]}

    def fetch(*_: Any) -> None:
        """What ZeRO-3 does before a layer."""

    fetch.__module__ = "deepspeed.runtime.zero.parameter_offload"
    other.register_forward_pre_hook(fetch)  # TRL leaves the one that counts passes
    other.lm_head.register_forward_pre_hook(lambda *_: None)
    assert hf_polyspec.generate(other, **levels).shape == (12, 9 + 14)  # gathered, as for plain generation
    hook = other.lm_head.register_forward_pre_hook(fetch)
    with pytest.raises(ValueError, match=r"the target \(LlamaForCausalLM\) has DeepSpeed ZeRO-3's hooks on its layers"):
        hf_polyspec.generate(other, **levels)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] \(.*\) has DeepSpeed ZeRO-3's hooks on its layers"):
        hf_polyspec.generate(unsplit, **{**levels, "assistant_models": [other]})
    weight.ds_persist = True  # small: every process has it whole at all times
    assert hf_polyspec.generate(other, **levels).shape == (12, 9 + 14)
    hook.remove()
    weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] \(LlamaForCausalLM\) has its weights partitioned"):
        hf_polyspec.generate(unsplit, **{**levels, "assistant_models": [other]})
    with pytest.raises(ValueError, match=r"the target \(LlamaForCausalLM\) has its weights partitioned by DeepSpeed"):
        hf_polyspec.generate(other, **levels)
