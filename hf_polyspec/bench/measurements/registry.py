# SPDX-License-Identifier: Apache-2.0
"""The measurements by name, as `polyspec measure NAME` runs them; listing them imports none."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ROOM = "hf_polyspec.bench.measurements"


@dataclass(frozen=True)
class Measurement:
    """Where a measurement is.

    Attributes:
        module: it defines `main(words)`, which parses the words behind the name and prints what it measured.
        help: one line.
    """

    module: str
    help: str


MEASUREMENTS = {
    "architectures": Measurement(f"{_ROOM}.architectures", "What becomes of every class of transformers as a target."),
    "auto": Measurement(f"{_ROOM}.auto", 'What assistant_models="auto" costs at first and brings afterwards.'),
    "batches": Measurement(
        f"{_ROOM}.batches", "Batches, alone and joining, and whether what was promised of them holds."
    ),
    "checks": Measurement(f"{_ROOM}.checks", "What a sampled check costs beside a greedy one and its draw."),
    "draft-vocabulary": Measurement(f"{_ROOM}.draft_vocabulary", "How many lm_head rows an EAGLE head should score."),
    "evaluation": Measurement(f"{_ROOM}.evaluation", "A task in an evaluation harness, with and without a chain."),
    "head-acceptance": Measurement(f"{_ROOM}.head_acceptance", "What a head's guesses are worth under its target."),
    "head-cost": Measurement(f"{_ROOM}.head_cost", "What a draft step of a head costs beside a target step."),
    "joining": Measurement(f"{_ROOM}.joining", "Prompts that join while others run, with and without drafts."),
    "overhead": Measurement(f"{_ROOM}.overhead", "How much of a three-level run is not spent in the models."),
    "paper-tables": Measurement("hf_polyspec.planning.theory.paper_tables", "The tables of docs/theory.md."),
    "pass-times": Measurement(f"{_ROOM}.pass_times", "What a pass over several tokens costs."),
    "peers": Measurement(f"{_ROOM}.peers", "Another engine's speed beside this package's, on the same batches."),
    "planner-accuracy": Measurement(f"{_ROOM}.planner_accuracy", "How well the planner predicts."),
    "replay": Measurement(f"{_ROOM}.replay", "What replaying the scans of a recurrent target's passes saves."),
    "same-seed": Measurement(f"{_ROOM}.same_seed", "Whether sampled texts are plain generate()'s own under a seed."),
    "server": Measurement(f"{_ROOM}.server", "Tokens a second through the server, beside the same chain in process."),
    "tensor-parallel": Measurement(f"{_ROOM}.tensor_parallel", "Chains on a target that processes split between them."),
    "vllm": Measurement(f"{_ROOM}.vllm_table", "vLLM's texts and acceptance with our levels, beside ours."),
    "worst-case": Measurement(f"{_ROOM}.worst_case", "What a control costs where nothing can be gained."),
}


def load_measurement(name: str) -> Callable[[Sequence[str]], None]:
    """The `main` of a measurement; underscores are taken for hyphens.

    Raises:
        ValueError: no measurement has that name; the sentence lists those there are.
    """
    found = MEASUREMENTS.get(name.replace("_", "-"))
    if found is None:
        raise ValueError(f"There is no measurement {name!r}; there are {', '.join(MEASUREMENTS)}.")
    main: Callable[[Sequence[str]], None] = importlib.import_module(found.module).main
    return main
