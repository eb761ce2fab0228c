# SPDX-License-Identifier: Apache-2.0
"""A head's norms and attention in compiled code give the numbers of torch's own."""

from __future__ import annotations

import pytest
import torch

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.eagle import attention
from hf_polyspec.eagle.attention import EagleRMSNorm, sdpa
from hf_polyspec.eagle.head_cache import HeadCache

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fed", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(dtype: torch.dtype, fed: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    cache = HeadCache()
    key, value = torch.randn(2, 2, 3, 21, 64, generator=generator).to(dtype)
    key, value = cache.append(0, key, value)
    query = torch.randn(2, 9, fed, 64, generator=generator).to(dtype)
    mask = torch.rand(2, 1, fed, 21, generator=generator) > 0.4 if masked else None
    seen: list[int] = []
    few = attention._compiled

    def watched(*given: torch.Tensor) -> torch.Tensor | None:
        seen.append(1)
        return few(*given)

    monkeypatch.setattr(attention, "_compiled", watched)
    with torch.no_grad():
        found = sdpa(query, key, value, mask, not masked and fed > 1)
    wanted = sdpa(query.double(), key.double(), value.double(), mask, not masked and fed > 1)  # never compiled
    assert seen == [1]
    assert found.shape == wanted.shape
    bound = 4 * torch.finfo(dtype).eps * float(value.abs().max())
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=bound)


@torch.no_grad()
def test_attention_that_sees_everything_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_compiled", lambda *_: pytest.fail("compiled attention is causal without a mask"))
    states = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    assert sdpa(states, states, states, None, False).shape == states.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype) -> None:
    norm = EagleRMSNorm(48, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        found = norm(x)
    wanted = norm(x)  # gradients on: torch's own
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
