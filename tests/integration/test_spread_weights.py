# SPDX-License-Identifier: Apache-2.0
"""Weights that processes hold parts of (FSDP, meshes of several dimensions): refused before any pass, or gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spread_target
from ranks import together


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(Path(spread_target.__file__), tmp_path_factory.mktemp("spread"), "everything")


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "the target by FSDP2": "the target (FSDPLlamaForCausalLM) is sharded by FSDP",
        "by FSDP2 over a copy": "the target (FSDPLlamaForCausalLM) is sharded by FSDP",
        "by FSDP2, auto": "the target (FSDPLlamaForCausalLM) is sharded by FSDP",
        "the target in FSDP1's wrapper": "the target (FullyShardedDataParallel) is sharded by FSDP",
        "a level by FSDP2": "assistant_models[0] (FSDPLlamaForCausalLM) is sharded over processes, and the target is",
        "synced_gpus": "synced_gpus (DeepSpeed ZeRO-3, FSDP) needs all processes to run the same number of forward",
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
