# SPDX-License-Identifier: Apache-2.0
"""Two real processes make the run that one process makes with twice the accumulation."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_polyspec.eagle.training.dataset import load_corpus, plan_batches
from hf_polyspec.eagle.training.shards import read_samples

SCRIPT = """
import pathlib, sys, torch, typer
from ranks import meet
from hf_polyspec.eagle.training.command import train_eagle
torch.set_num_threads(1)
meet(pathlib.Path.cwd(), pathlib.Path(sys.argv[2]).stem)
typer.run(train_eagle)
"""


def start(script: Path, config: Path, rank: int, world: int) -> subprocess.Popen[str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment = {**os.environ, **{key: str(value) for key, value in names.items()}}
    root = str(Path(__file__).parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(script), "--config", str(config), "--cpu"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=script.parent
    )


def finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output


def curve(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as handle:
        rows = csv.DictReader(handle)
        return [{key: float(value) for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def test_two_processes(chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat_target.save_pretrained(str(tmp_path / "target"))
    chat_tokenizer.save_pretrained(str(tmp_path / "target"))
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    (tmp_path / "prompts.txt").write_text("\n".join(f"w{i} w{(7 * i + 1) % 40}" for i in range(31)))
    for name, accumulation in (("two", 1), ("one", 2)):
        values = {
            "target": str(tmp_path / "target"),
            "output": str(tmp_path / name),
            "prompts": str(tmp_path / "prompts.txt"),
            "texts": str(tmp_path / "two" / "texts") if name == "one" else None,
            "generation": {"max_tokens": 10**6, "slots": 4, "max_new_tokens": 10, "max_prompt_tokens": 16},
            "head": {"draft_vocab_size": 30},
            # an odd number of batches: in the last step one process has none of its own
            "optimization": {
                "epochs": 1, "steps": 2, "batch_tokens": 40, "accumulation": accumulation, "warmup_steps": 2,
                "validation_fraction": 0.2, "validation_steps": 2, "checkpoint_every": 3, "log_every": 1,
            },
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    finish([start(script, tmp_path / "two.yaml", rank, 2) for rank in range(2)])
    # every prompt was answered by exactly one of them
    texts = tmp_path / "two" / "texts"
    assert len(list(texts.glob("shard-000-*"))) == len(list(texts.glob("shard-001-*"))) == 1
    assert [sample.number for sample in read_samples(texts)] == list(range(31))
    finish([start(script, tmp_path / "one.yaml", 0, 1)])
    corpus = load_corpus([texts], 2048, 0.2, seed=0)
    assert len(plan_batches(corpus.train, 40, seed=0, epoch=0)) % 2 == 1
    both, single = curve(tmp_path / "two" / "curve.csv"), curve(tmp_path / "one" / "curve.csv")
    assert len(both) == len(single) >= 4
    for ours, theirs in zip(both, single, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    records = [(tmp_path / name / "validation.jsonl").read_text() for name in ("two", "one")]
    assert records[0] == records[1]
