# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure vllm`: what `generate()` is compared with is what our proposer would do, pass for pass."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_pair
from tiny_models import head_for, noisy, prompts, tiny

from hf_polyspec.bench.measurements import vllm_table
from hf_polyspec.bench.measurements.vllm_table import Bench
from hf_polyspec.generation.chain import build_below, check_assistants
from hf_polyspec.generation.doors import generate
from hf_polyspec.generation.options import PolySpecOptions
from hf_polyspec.generation.setting import Setting
from hf_polyspec.integrations import vllm
from hf_polyspec.integrations.histories import Histories
from hf_polyspec.integrations.vllm import _own
from hf_polyspec.levels import draft_vocabulary
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.models.by_name import load_model

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


@pytest.mark.parametrize("chain", ["suffix", "int8+suffix"])
def test_the_command_says_what_both_did(
    chain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an engine of the test's own in vLLM's place, which does as it is asked."""
    folder, _ = save_pair(tmp_path)
    asked: list[dict[str, Any]] = []

    def ran(command: Sequence[str], **_: Any) -> Any:
        request, answer = json.loads(Path(command[-2]).read_text()), Path(command[-1])
        asked.append(request)
        answer.write_text(json.dumps(answered(request, plain=len(asked) == 1)))

    monkeypatch.setattr(vllm_table, "subprocess", SimpleNamespace(run=ran))
    monkeypatch.setattr(vllm_table, "find_spec", lambda name: name)
    words = ["--model", str(folder), "--prompts", "2", "--new-tokens", "16", "--draft-tokens", "3", "--rows", "2"]
    vllm_table.main([*words, "--chain", chain])
    said = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(r"(\S+) +2 of 2 +([\d.]+) +([\d.]+) +2\.0 +3\.00x", said)
    assert found is not None, said
    assert found[1] == chain
    assert float(found[2]) == float(found[3]) > 1.0  # as many tokens a pass
    plain, drafted = (request["engine"] for request in asked)
    assert drafted.pop("speculative_config")["num_speculative_tokens"] == (3 if chain == "suffix" else 6)
    assert ("additional_config" in drafted) == (chain != "suffix")
    drafted.pop("additional_config", None)
    assert plain == drafted
    assert (plain["model"], plain["max_num_seqs"], plain["gpu_memory_utilization"]) == (str(folder), 2, 0.4)


def answered(request: dict[str, Any], plain: bool) -> dict[str, Any]:
    """What an engine tells: greedy texts, and how often it asked our class since each prompt was read."""
    model = load_model(request["engine"]["model"])
    texts, passes = [], 0
    drafts = request["engine"].get("speculative_config", {})
    extra = request["engine"].get("additional_config", {})
    assert plain == (not drafts)
    for ids in request["prompts"]:
        text = model.generate(torch.tensor([ids]), max_new_tokens=request["new_tokens"], do_sample=False)[0].tolist()
        texts.append(text[len(ids) :])
        if not plain:
            proposer = getattr(vllm, drafts["model"].rpartition(".")[2])(config_of(request["engine"], model, extra))
            passes += passes_of(proposer, len(ids) + 1, text)
    return {"texts": texts, "seconds": 6.0 if plain else 2.0, "drafts": None, "passes": passes}


def passes_of(proposer: Any, done: int, text: list[int]) -> int:
    """Of an engine that accepts what a text goes on with, and adds a token of its own."""
    passes = 0
    while done < len(text):
        [draft] = proposer.propose([text[done - 1 : done]], torch.tensor([done]), torch.tensor([text[:done]]))
        kept = next((i for i, (a, b) in enumerate(zip(draft, text[done:], strict=False)) if a != b), len(draft))
        done += kept + 1
        passes += 1
    return passes


def config_of(engine: dict[str, Any], model: Any, extra: dict[str, Any]) -> Any:
    """What is read of vLLM's."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=engine["speculative_config"]["num_speculative_tokens"]
        ),
        model_config=SimpleNamespace(
            model=engine["model"],
            dtype=torch.float32,
            max_model_len=engine["max_model_len"],
            get_vocab_size=lambda: model.config.vocab_size,
            hf_config=model.config,
        ),
        device_config=SimpleNamespace(device="cpu"),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        additional_config=extra,
    )
