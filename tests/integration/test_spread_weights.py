# SPDX-License-Identifier: Apache-2.0
"""Weights that processes hold parts of (FSDP, meshes of several dimensions): run together, gathered, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spread_target
import torch
from ranks import together
from tiny_models import noisy

import hf_polyspec


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(Path(spread_target.__file__), tmp_path_factory.mktemp("spread"), "everything")


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "FSDP2, auto": 'assistant_models="auto" runs as many passes as pay, and the weights of the target (FSDPLlama',
        "FSDP2, an early exit": "An early exit of FSDPLlamaForCausalLM would need passes of its own, in which all",
        "the target in FSDP1's wrapper": "the target (FullyShardedDataParallel) is sharded by FSDP1",
        "a level by FSDP2": "assistant_models[0] (FSDPLlamaForCausalLM) is sharded over processes, and the target is",
        "synced_gpus": "synced_gpus is for processes that must run the same number of forward passes",
        "a mesh of two dimensions": "the target (LlamaForCausalLM) is sharded over a mesh of 2 dimensions",
    }.items(),
)
def test_what_is_spread_is_refused_in_one_sentence(seen: list[dict[str, Any]], name: str, words: str) -> None:
    for process in seen:
        assert process[name].startswith(f"ValueError: {words}")
        assert process[name].count(". ") == 0


@pytest.mark.parametrize("name", ["plain by FSDP2", "gathered of FSDP1", "unwrapped of DDP", "of each one's own"])
def test_what_is_whole_is_generated_from_after_that(seen: list[dict[str, Any]], name: str) -> None:
    wanted = spread_target.made().generate(**spread_target.PROMPTS, **spread_target.PLAIN).tolist()
    for process in seen:
        assert process[name] == wanted


@pytest.mark.parametrize(
    "name",
    ["suffix", "a small model", "int8 over suffix", "synced_gpus", "online", "a head", "a head in trees",
     "int8 over a head"],
)  # fmt: skip
def test_under_fsdp2_each_process_writes_its_own_text(seen: list[dict[str, Any]], name: str) -> None:
    for rank, process in enumerate(seen):
        wanted = spread_target.made().generate(**spread_target.own(rank)).tolist()
        assert process[f"FSDP2, {name}"] == wanted
        assert process["FSDP2, all is well"] == wanted


@pytest.mark.parametrize("name", ["a head in one", "a head in the other"])
def test_under_fsdp2_a_head_may_stand_in_one_process(seen: list[dict[str, Any]], name: str) -> None:
    changed = spread_target.made()
    with torch.no_grad():
        changed.model.embed_tokens.weight.mul_(1.25)
    for rank, process in enumerate(seen):
        assert process[f"FSDP2, {name}"] == changed.generate(**spread_target.own(rank)).tolist()


def test_under_fsdp2_each_process_samples_with_its_own_seed(seen: list[dict[str, Any]]) -> None:
    for rank, process in enumerate(seen):
        torch.manual_seed(5 + rank)
        wanted = spread_target.made().generate(**{**spread_target.own(rank), "do_sample": True}).tolist()
        assert process["FSDP2, sampled"] == wanted


def test_under_fsdp2_what_ends_in_one_process_ends_in_all(seen: list[dict[str, Any]]) -> None:
    first, second = seen
    assert "num_assistant_tokens" in second["FSDP2, refused in one"]
    assert first["FSDP2, refused in one"].startswith("ValueError: process 1 of 2 refused this call: ")
    assert first["FSDP2, fails in one"].startswith("ValueError: ")
    assert first["FSDP2, fails in one"].endswith("enough")
    failed = "LevelError: the forward pass of the target failed: "
    assert second["FSDP2, fails in one"].startswith(
        f"{failed}another process that holds a part of the target's weights"
    )
    assert second["FSDP2, ends in one"].startswith(failed)  # between two passes, or in the middle of one
    assert "FSDP2, ends in one" not in first


def test_pairs_that_share_a_target_generate_beside_each_other(tmp_path: Path) -> None:
    seen = together(Path(spread_target.__file__), tmp_path, "meshes", ranks=4)
    whole = spread_target.made()
    for rank, process in enumerate(seen):
        how = spread_target.own(rank // 2)
        wanted = whole.generate(**how).tolist()
        assert process["a pair"] == wanted
        assert process["a pair over a copy"] == wanted
        torch.manual_seed(5 + rank // 2 * 2)  # the first of the two draws
        chain = {"assistant_models": [noisy(whole, 0.05)], "polyspec_verification": "block"}
        drawn = hf_polyspec.generate(whole, **{**how, "do_sample": True}, **chain)
        assert process["a pair, drawn"] == drawn.tolist()
