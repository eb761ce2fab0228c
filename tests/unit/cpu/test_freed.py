# SPDX-License-Identifier: Apache-2.0
"""What a layer gives back is there for the next one, without the system's help."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from hf_polyspec.cpu import freed
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.freed import keep_freed
from hf_polyspec.quantization import pack

Tiny = Callable[..., PreTrainedModel]
SCRIPT = """
import resource
import torch
from hf_polyspec.cpu.freed import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer = [torch.ones(1 << 21, dtype=torch.uint8) for _ in range(12)]
    del layer
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
keep_freed()
faults()
print(faults())
"""


@pytest.fixture
def anew() -> Iterator[None]:
    keep_freed.cache_clear()
    yield
    keep_freed.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of the C library that Linux has")
def test_a_second_layer_takes_what_the_first_gave_back() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert int(run.stdout) < 12 * (1 << 21) // 4096 // 4


@pytest.mark.usefixtures("anew")
def test_too_little_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(freed.torch, "empty", refused)
    keep_freed()


@pytest.mark.usefixtures("anew")
@pytest.mark.skipif(not compiles(), reason="compiled functions do not run here")
def test_a_fused_block_sees_to_it(tiny: Tiny) -> None:
    model = pack(tiny("llama"))
    with torch.no_grad():
        model(torch.randint(48, (1, 12), generator=torch.Generator().manual_seed(5)))
    assert keep_freed.cache_info().currsize == 1
