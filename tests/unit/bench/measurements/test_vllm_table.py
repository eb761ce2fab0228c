# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure vllm`: what `generate()` is compared with is what our proposer would do, pass for pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import head_for, noisy, prompts, tiny

from hf_polyspec.bench.measurements import vllm_table
from hf_polyspec.bench.measurements.vllm_table import Bench
from hf_polyspec.generation.chain import build_below, check_assistants
from hf_polyspec.generation.doors import generate
from hf_polyspec.generation.options import PolySpecOptions
from hf_polyspec.generation.setting import Setting
from hf_polyspec.integrations.histories import Histories
from hf_polyspec.integrations.vllm import _own
from hf_polyspec.levels import draft_vocabulary
from hf_polyspec.levels.suffix import SuffixDrafter

NEW, OFFERED = 24, 3
ENDS = 5
"""The row whose text ends with an id of its own."""


@pytest.fixture(scope="module")
def bench() -> Any:
    made: Any = Bench.__new__(Bench)
    made.target = tiny("llama", vocab_size=13)
    made.new_tokens, made.draft_tokens = NEW, OFFERED
    rows = prompts(6, 9, vocabulary=13)["input_ids"]
    made.prompts = [
        {"input_ids": row[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows
    ]
    made.target.generation_config.pad_token_id = 0
    last = made.target.generate(**made.prompts[ENDS], max_new_tokens=8, do_sample=False)[0, -1]
    made.target.generation_config.eos_token_id = int(last)
    width = rows.shape[1]
    texts = [
        made.target.generate(**one, max_new_tokens=NEW, do_sample=False)[0, width:].tolist() for one in made.prompts
    ]
    assert len(texts[ENDS]) <= 8 < max(map(len, texts))
    made.plain = {"texts": texts}
    return made


def replayed(bench: Any, levels: list[Any]) -> float:
    """Tokens a pass of an engine that asks our proposer, verifies its drafts, and does not tell it of lengths."""
    sizes = PolySpecOptions(polyspec_block_size=OFFERED, num_assistant_tokens=OFFERED)
    ends = [bench.target.generation_config.eos_token_id]
    setting = Setting(sizes, torch.device("cpu"), frozenset(ends), 0, batch=1)
    checked = check_assistants(bench.target, levels)
    most = OFFERED if len(levels) == 1 else 2 * OFFERED  # a block may run over by its last round
    tokens = passes = 0
    for prompt, text in zip(bench.prompts, bench.plain["texts"], strict=True):
        proposer = Histories(lambda: build_below([_own(one) for one in checked], setting), 13, ends)
        ids, done = prompt["input_ids"][0].tolist(), 1
        while done < len(text):
            draft = proposer.propose([ids + text[:done]], [most])[0]
            same = next((i for i, (a, b) in enumerate(zip(draft, text[done:], strict=False)) if a != b), None)
            done += 1 + (min(len(draft), len(text) - done) if same is None else same)
            passes += 1
        tokens += len(text) - 1
    return tokens / passes


@pytest.mark.parametrize("names", [["suffix"], ["middle", "suffix"]], ids="+".join)
def test_the_chain_starts_and_ends_where_the_proposer_does(
    bench: Any, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"suffix": SuffixDrafter(), "middle": noisy(bench.target, 0.02)}
    monkeypatch.setattr(vllm_table, "by_name", lambda target, words: [made[word] for word in words])
    assert bench._here(names) == replayed(bench, [made[name] for name in names])


def test_a_head_waits_for_what_the_prompts_pass_has_read(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_table, "by_name", lambda target, words: [head_for(bench.target)])
    assert 1.0 <= bench._here(["head"]) < 2.0  # an untrained head; a pass for each token, or a little better


def test_a_head_chooses_from_all_ids(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose file ranks them too, which `generate()` would have choose from the most frequent."""
    head = head_for(bench.target)
    head.config.frequent_tokens = [3, 4]
    monkeypatch.setattr(draft_vocabulary, "AUTO_ROWS", 2)
    monkeypatch.setattr(vllm_table, "by_name", lambda target, words: [head])
    scored = []

    def seen(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs)
        scored.append(out.polyspec.levels[-1].draft_vocabulary)
        return out

    monkeypatch.setattr(vllm_table, "generate", seen)
    bench._here(["head"], alone=True)
    assert set(scored) == {None}
    scored.clear()
    bench._here(["head"])  # below our own proposer it chooses as it does here
    assert None not in scored
