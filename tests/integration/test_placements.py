# SPDX-License-Identifier: Apache-2.0
"""Where levels run below a target that two processes split (gloo, on the CPU): texts, the choice, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import placed_levels
import pytest
import split_target
import torch
from ranks import together
from tiny_models import noisy, tiny
from transformers import PreTrainedModel

from hf_polyspec.generation import settling

# Whichever test comes first waits for all that the processes do (`ranks.together` has a limit of its own).
pytestmark = pytest.mark.timeout(960)
SCRIPT = Path(placed_levels.__file__)
CHAINS = {
    "suffix": 1,
    "int8, suffix": 2,
    "head in trees": 1,
    "head, suffix": 2,
    "middle, small": 2,
    "middle, head": 2,
}
"""Members below the target."""


@pytest.fixture(scope="module")
def unsplit() -> PreTrainedModel:
    return tiny("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=4)


@pytest.fixture(scope="module")
def seen(unsplit: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process saw."""
    folder = tmp_path_factory.mktemp("placed")
    unsplit.save_pretrained(folder / "target")
    noisy(unsplit, 0.02).save_pretrained(folder / "alike")
    tiny("llama", num_hidden_layers=1, seed=4).save_pretrained(folder / "small")
    return together(SCRIPT, folder, "everything")


@pytest.fixture(scope="module")
def texts(unsplit: PreTrainedModel) -> dict[str, Any]:
    """Plain generation's, by one process: greedy, and sampled with the seed of process 0."""
    torch.manual_seed(split_target.SEED)
    return {
        "": unsplit.generate(**placed_levels.FEW, **split_target.PLAIN).tolist(),
        ", sampled": unsplit.generate(**placed_levels.FEW, **split_target.SAMPLED).tolist(),
    }


@pytest.mark.parametrize("mode", ["", ", sampled"])
@pytest.mark.parametrize("place", ["one", "replicated"])
@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_writes_the_unsplit_models_text_in_every_place(
    seen: list[dict[str, Any]], texts: dict[str, Any], name: str, place: str, mode: str
) -> None:
    wanted = [texts[mode], {"places": [place] * CHAINS[name], "seconds": {}}]
    assert [one[f"{name}, {place}{mode}"] for one in seen] == [wanted, wanted]  # each began with a seed of its own


@pytest.mark.parametrize("mode", ["", ", sampled"])
@pytest.mark.parametrize("places", placed_levels.SPLIT_PLACES)
def test_a_copy_of_a_split_target_may_be_split_too(
    seen: list[dict[str, Any]], texts: dict[str, Any], places: tuple[str, str], mode: str
) -> None:
    wanted = [texts[mode], {"places": list(places), "seconds": {}}]
    assert [one[f"int8, suffix, {', '.join(places)}{mode}"] for one in seen] == [wanted, wanted]


@pytest.mark.parametrize("name", ["suffix", "int8, suffix"])
def test_what_is_possible_is_measured_and_what_is_chosen_is_the_same_in_all(
    seen: list[dict[str, Any]], texts: dict[str, Any], name: str
) -> None:
    placement = seen[0][f"{name}, auto"][1]
    assert [one[f"{name}, auto"] for one in seen] == [[texts[""], placement]] * 2
    ways = [", ".join([place] * CHAINS[name]) for place in ("one", "replicated")]
    if name == "int8, suffix":
        ways += [", ".join(places) for places in placed_levels.SPLIT_PLACES]
    assert list(placement["seconds"]) == ways
    assert ", ".join(placement["places"]) in ways


@pytest.mark.parametrize("name", ["split int8, head, one", "split int8, head, replicated", "split int4, suffix"])
def test_a_split_copy_lends_to_a_head_and_has_any_bits(
    seen: list[dict[str, Any]], texts: dict[str, Any], name: str
) -> None:
    for one in seen:
        text, placement = one[name]
        assert text == texts[""]
        assert placement["places"][0] == "sharded"


def test_above_what_is_split_a_copy_is_in_all_processes(seen: list[dict[str, Any]], texts: dict[str, Any]) -> None:
    for one in seen:
        text, placement = one["int8, early exit"]
        assert text == texts[""]
        assert set(placement["seconds"]) == {"replicated, sharded", "sharded, sharded"}


def test_what_follows_the_clock_of_one_process_runs_in_it(seen: list[dict[str, Any]], texts: dict[str, Any]) -> None:
    for one in seen:
        text, placement = one["int8, suffix, online"]
        assert text == texts[""]
        assert set(placement["seconds"]) == {"one, one", "sharded, one"}


def test_where_processes_draft_differently_the_first_ones_draft_counts(
    seen: list[dict[str, Any]], texts: dict[str, Any]
) -> None:
    assert [one["a drafter that differs"] for one in seen] == [[texts[""], True]] * 2


@pytest.mark.parametrize(
    ("name", "place", "seconds"),
    [
        ("nothing takes time", "one", (0.0, 0.0)),
        ("the other process drafts slowly", "one", (1.0, 2.0)),
        ("messages take time", "replicated", (1.0, 0.0)),
        ("a little", "one", (1.01, 1.0)),
        ("clocks disagree", "replicated", (5.0, 2.0)),
    ],
)
def test_the_choice_follows_the_slowest_clock(
    seen: list[dict[str, Any]], texts: dict[str, Any], name: str, place: str, seconds: tuple[float, float]
) -> None:
    for rank, one in enumerate(seen):
        text, placement, again, asked = one[name]
        assert text == texts[""]
        assert placement["places"] == [place]
        assert list(placement["seconds"].values()) == pytest.approx(seconds)
        assert again == placement  # what takes long later is not measured
        assert asked or (rank and place == "one")


def test_an_arrangement_without_hope_is_left_after_a_draft(seen: list[dict[str, Any]]) -> None:
    """One draft beside that which pays for what is set up once, and no second turn."""
    _, placement, asked = seen[1]["hopeless"]
    assert placement["places"] == ["one"]
    assert list(placement["seconds"].values()) == pytest.approx([1.0, 30.0])
    assert asked == settling.WARM + 1


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "split what is whole": 'cannot be placed "sharded": it is not split as the target is; possible is "one" or',
        "one above another": "what is whole below the last split level runs all in process 0 or all in every process",
        "split in one": 'cannot be placed "one": its weights are split; possible is "sharded".',
        "nobody knows": 'assistant_models[0] (failing) cannot be placed "replicated": nobody says that it drafts alike',
        "with draws": 'cannot be placed "replicated": levels draw by themselves here',
        "under a control": 'cannot be placed "replicated": its sizes follow process 0\'s clock',
        "too few": "polyspec_placement names 1 placements, and assistant_models has 2 members",
        "no such place": "polyspec_placement must be one of 'auto', 'one', 'replicated', 'sharded'",
    }.items(),
)
def test_what_is_not_possible_is_refused_in_a_sentence(seen: list[dict[str, Any]], name: str, words: str) -> None:
    for one in seen:
        assert one[name].startswith("ValueError: ")
        assert words in one[name]
        assert one[name].count(". ") == 0


def test_what_fails_in_one_process_fails_in_all(seen: list[dict[str, Any]], texts: dict[str, Any]) -> None:
    words = "assistant_models[0] (ending) failed to propose: out of luck"
    left, right = (one["fails in one"] for one in seen)
    assert left.startswith("LevelError: in process 1, " + words)
    assert right.startswith("LevelError: " + words)
    assert [one["all is well"] for one in seen] == [texts[""]] * 2


def test_who_is_left_when_one_process_is_killed_is_told(seen: list[dict[str, Any]]) -> None:
    left, gone = seen
    assert left["killed"].startswith("LevelError: the target: a process that shares it does not answer any more")
    assert "killed" not in gone
