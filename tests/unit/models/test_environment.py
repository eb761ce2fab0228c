# SPDX-License-Identifier: Apache-2.0
"""The line under figures, and what a profile of "auto" holds for."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from hf_polyspec.auto.profile import Key
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.models import environment
from hf_polyspec.models.environment import describe, processor


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    processor.cache_clear()
    yield
    processor.cache_clear()


def test_instructions_are_part_of_the_processors_name() -> None:
    name, _, instructions = processor().removesuffix(")").rpartition(" (")
    assert name
    assert instructions.split(", ")[0] == torch.backends.cpu.get_cpu_capability()
    assert describe().startswith(f"{processor()}, {torch.get_num_threads()} of ")


def test_a_numba_that_does_not_run_leaves_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiles():  # asked before numba is gone, since the answer is kept
        pytest.skip("compiled functions do not run here")
    for name in [name for name in sys.modules if name.startswith("hf_polyspec.cpu.compiled.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert processor().endswith(f"({torch.backends.cpu.get_cpu_capability()})")


def test_machines_of_one_name_with_other_instructions_have_other_profiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key() -> Key:
        processor.cache_clear()
        return Key.here("weights", torch.bfloat16, torch.device("cpu"), True, "plain")

    found = []
    for instructions in (["AVX2"], ["AVX512"], ["AVX512", "bfloat16"], ["AVX512", "bfloat16", "AMX"]):
        monkeypatch.setattr(environment, "_instructions", lambda kind=instructions: kind)
        found.append(key())
    assert len({one.name for one in found}) == 4
    assert key() == found[-1]
