# SPDX-License-Identifier: Apache-2.0
"""A task of four lines that are to be copied, for `--custom-tasks`."""

from pathlib import Path
from typing import Any

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def ask(line: dict[str, Any], task_name: str) -> Doc:
    """A question as it is, and its answer."""
    return Doc(task_name=task_name, query=line["question"], choices=[line["answer"]], gold_index=0)


TASKS_TABLE = [
    LightevalTaskConfig(
        name="polyspec_copying",
        prompt_function=ask,
        hf_repo=str(Path(__file__).with_name("questions")),
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=48,
        stop_sequence=["\n\n"],
        metrics=[Metrics.exact_match],
        version=0,
    )
]
