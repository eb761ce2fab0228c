# SPDX-License-Identifier: Apache-2.0
"""What a pass may cost besides the pass: one read of a tensor by the host, no generate() inside generate()."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from tiny_models import noisy, tiny
from transformers import GenerationMixin

import hf_polyspec
from hf_polyspec.bench.measurements.overhead import measure

ON_THE_HOST = ("hf_polyspec.exactness.largest", "hf_polyspec.cpu.whole_pass", "hf_polyspec.cpu.compiled.attention")
"""Modules that read nothing but what lies in the host's memory, where there is nothing to wait for."""
READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")


@pytest.fixture
def chain() -> list[Any]:
    target = tiny()
    return [target, noisy(target, 0.02), noisy(target, 0.05, seed=2)]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=["greedy", "sampled"])
def test_one_host_synchronisation_per_forward_pass(
    chain: list[Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way of reading a tensor is counted where this package's own code does it; a few more belong to the call."""
    reads: list[str] = []

    def counting(name: str) -> Any:
        genuine = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            name_of_reader = sys._getframe(1).f_globals["__name__"]
            if name_of_reader.startswith("hf_polyspec") and name_of_reader not in ON_THE_HOST:
                reads.append(name)
            return genuine(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    outputs = {}
    for length in (10, 60):
        reads.clear()
        output = hf_polyspec.generate(
            chain[0],
            torch.tensor([[1, 2, 3]]),
            assistant_models=chain[1:],
            max_new_tokens=length,
            return_dict_in_generate=True,
            polyspec_block_size=4,
            num_assistant_tokens=3,
            **options,
        )
        outputs[length] = (len(reads), sum(level.forward_passes for level in output.polyspec.levels))
    extra_reads = outputs[60][0] - outputs[10][0]
    extra_passes = outputs[60][1] - outputs[10][1]
    assert extra_passes > 50
    assert extra_reads <= extra_passes


def test_no_generate_inside_generate(chain: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    genuine = GenerationMixin.generate

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", counting)
    hf_polyspec.generate(chain[0], torch.tensor([[1, 2, 3]]), assistant_models=chain[1:], max_new_tokens=20)
    assert calls == [chain[0]]


def test_the_overhead_benchmark_adds_up(chain: list[Any]) -> None:
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    run = measure(chain[0], chain[1:], inputs, new_tokens=12)
    assert run.forward_passes > 3
    assert 0 < run.forward_seconds < run.total_seconds
    assert run.share == pytest.approx(1 - run.forward_seconds / run.total_seconds)
