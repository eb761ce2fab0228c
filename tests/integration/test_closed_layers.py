# SPDX-License-Identifier: Apache-2.0
"""Models whose cache has layers of their own class: DeepSeek V4's compressed ones, Unlimited OCR's moving window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host.modeling import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from hf_polyspec.host.recurrent import RecurrentRunner
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.telemetry.counters import LevelStats

NEW = 40
RATES = {"compressed_sparse_attention": 2, "heavily_compressed_attention": 6}
"""Columns that become one entry, few enough for many to close within a text."""


@pytest.fixture(scope="module")
def compressing() -> Any:
    return tiny_model("deepseek_v4", AutoModelForCausalLM, {"compress_rates": RATES, "sliding_window": 7})


def _tensors(cache: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for place, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            for inner, one in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(one, torch.Tensor):
                    yield f"{place} {name} {inner}", one


def test_text_and_cache_are_plain_generations(enabled: None, compressing: Any) -> None:
    call = {**prompts(1), "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    plain = compressing.generate(**call)
    for chain, most in (([noisy(compressing, 0.0)], 0.4), ([noisy(compressing, 0.02), noisy(compressing, 0.04)], 1.0)):
        got = compressing.generate(**call, assistant_models=chain, num_assistant_tokens=5)
        assert got.sequences.tolist() == plain.sequences.tolist()
        assert got.polyspec.levels[0].forward_passes <= most * NEW
        held = dict(_tensors(got[GENERATION_CACHE]))
        for name, wanted in _tensors(plain[GENERATION_CACHE]):
            torch.testing.assert_close(held[name], wanted, atol=1e-3, rtol=1e-3)


def test_padded_rows_are_read_one_token_a_pass(enabled: None, compressing: Any) -> None:
    """Of a padded row's compressed entries a pass over several tokens sees others than passes over one."""
    call = {**prompts(3), "max_new_tokens": NEW, "do_sample": False}
    call["eos_token_id"] = int(compressing.generate(**call)[1, -NEW + 9])
    call["return_dict_in_generate"] = True
    plain = compressing.generate(**call).sequences.tolist()
    got = compressing.generate(**call, assistant_models=[noisy(compressing, 0.03)])
    assert got.sequences.tolist() == plain
    assert any("one token a pass" in note for note in got.polyspec.levels[0].notes)


@torch.no_grad()
def test_rows_are_fed_evenly(compressing: Any) -> None:
    """Uneven rows without padding: logits are those of each alone. Such layers count columns once for all rows."""
    texts = [[7 * n % 37 + 3 for n in range(90)], [5 * n % 31 + 4 for n in range(90)]]
    prompt = Prompt(4, None, torch.arange(4).expand(2, -1))
    both, stats = RecurrentRunner(compressing, "both"), LevelStats("both", 0)
    alone = [RecurrentRunner(compressing, "alone") for _ in texts]
    ends = [4, 4]
    for draft, accepted in 4 * [(4, (0, 4)), (3, (3, 0)), (4, (1, 4)), (2, (2, 0)), (4, (4, 1))]:
        context = Context([text[:end] for text, end in zip(texts, ends, strict=True)], prompt)
        drafts = [text[end : end + draft] for text, end in zip(texts, ends, strict=True)]
        found = both.run(context, drafts, stats).logits
        for row, runner in enumerate(alone):
            one = Context([context.ids[row]], prompt.select([row]))
            torch.testing.assert_close(found[row], runner.run(one, [drafts[row]], stats).logits[0], atol=1e-3, rtol=0)
        ends = [end + 1 + more for end, more in zip(ends, accepted, strict=True)]


def test_a_window_whose_mask_goes_wrong_behind_padding(enabled: None) -> None:
    """Beyond the window plain generation's own text of a padded row depends on how many tokens a pass reads."""
    if "unlimited_ocr" not in CONFIG_MAPPING:
        return  # a release before that model
    model = tiny_model("unlimited_ocr", AutoModelForImageTextToText)
    call = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**call).tolist()
    assert model.generate(**call, assistant_models=[noisy(model, 0.03)]).tolist() == plain
    plain = model.generate(**prompts(2), max_new_tokens=2, do_sample=False)
    with pytest.warns(UserWarning, match=r"UnlimitedOcrForConditionalGeneration\) does not mind the padding"):
        got = model.generate(**prompts(2), max_new_tokens=2, do_sample=False, assistant_models=[noisy(model, 0.03)])
    assert got.tolist() == plain.tolist()
