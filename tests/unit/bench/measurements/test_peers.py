# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure peers`: another engine in its own process takes turns with the ways of this one."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import in_circles, tiny

from hf_polyspec.bench.measurements import batches, peer_vllm, peers
from hf_polyspec.bench.measurements.batch_jobs import Job

PROMPTS = {
    "input_ids": torch.tensor([[0, 0, 3, 4], [9, 8, 7, 6]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
}
ECHO = """
import json, sys
assert json.loads(sys.stdin.readline()) == {"model": "m"}
print(json.dumps({"version": "0.1"}), flush=True)
for line in sys.stdin:
    batch = json.loads(line)
    answer = {"seconds": 1000.0, "texts": [ids[:1] * batch["new_tokens"] for ids in batch["prompts"]]}
    print(json.dumps(answer), flush=True)
"""


def test_a_peer_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "peer.py"
    program.write_text(ECHO)
    monkeypatch.setitem(peers.PEERS, "echo", program)
    job = Job("unequal", "unequal", 2, PROMPTS)
    with peers.running("echo", sys.executable, {"model": "m"}) as peer:
        assert peer.generate([[3, 4], [9]], 2) == (1000.0, [[3, 3], [9, 9]])
        rates = peers.measure(peer, in_circles(tiny()), job, ["suffix"], form="float32", new_tokens=6, rounds=1)
    assert [rate.way for rate in rates] == ["echo 0.1", batches.ALONE, "suffix"]
    assert rates[0].ratio == 1
    assert rates[0].per_second == pytest.approx(12 / 1000)
    for rate in rates[1:]:
        assert (rate.tokens, rate.alike) == (12, 0)
        assert rate.ratio == pytest.approx(rate.per_second / rates[0].per_second)


def test_a_peer_that_does_not_come_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "peer.py"
    program.write_text("raise SystemExit('there is no such engine')")
    monkeypatch.setitem(peers.PEERS, "echo", program)
    with (
        pytest.raises(RuntimeError, match="echo ended without an answer: there is no such engine"),
        peers.running("echo", sys.executable, {}),
    ):
        pass


def test_what_is_asked_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Engine:
        def __init__(self, **given: Any) -> None:
            asked.append(given)

        def generate(self, prompts: list[Any], rules: Any, use_tqdm: bool) -> list[Any]:
            asked.append((prompts, rules))
            texts = [types.SimpleNamespace(token_ids=(one["prompt_token_ids"][0], 7)) for one in prompts]
            return [types.SimpleNamespace(outputs=[text]) for text in texts]

    module = types.ModuleType("vllm")
    module.__version__ = "0.32"  # type: ignore[attr-defined]
    module.LLM, module.SamplingParams = Engine, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    lines = [{"model": "m", "dtype": "float32"}, {"prompts": [[3, 4], [5]], "new_tokens": 2}]
    told = io.StringIO()
    peer_vllm.serve(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), told)
    version, answer = (json.loads(line) for line in told.getvalue().splitlines())
    assert version == {"version": "0.32"}
    assert answer["texts"] == [[3, 7], [5, 7]]
    assert answer["seconds"] >= 0
    rules = {"temperature": 0.0, "max_tokens": 2}
    assert asked == [lines[0], ([{"prompt_token_ids": [3, 4]}, {"prompt_token_ids": [5]}], rules)]
