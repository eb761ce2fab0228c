# SPDX-License-Identifier: Apache-2.0
"""One of the processes that split a target: `python -m hf_polyspec.bench.measurements.tensor_parallel_run FOLDER`.

Its rank and how to meet the others stand in the environment, as torchrun leaves them. FOLDER holds `request.json`;
what this process saw goes into `seen-RANK`, a line for each call, so that what came before its end is known too.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

ENDS_AT = 3
"""Steps after which a process that is to end does so."""


class _Ends:
    """A logits processor in which its process is killed, or stands still; all processes have one, and one ends."""

    def __init__(self, note: Path, how: str, ends: bool) -> None:
        self.note, self.how, self.ends, self.steps = note, how, ends, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.ends and self.steps > ENDS_AT:
            self.note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL if self.how == "killed" else signal.SIGSTOP)
        return scores


def run(folder: Path, rank: int) -> None:
    """Make all calls of a request.

    Args:
        folder: with `request.json`: `model`, a folder; `prompts`, rows of ids and mask; `options` of `generate()`;
            `calls`, each with a `name`, `levels`, `options` and `seeds` of the processes, or with how the last process
            `ends` in it; `timeout` in seconds.
        rank: of this process.
    """
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, LogitsProcessorList

    from hf_polyspec.generation.doors import generate
    from hf_polyspec.generation.kept_placements import measure_anew
    from hf_polyspec.host.generation import quiet

    quiet(errors_only=True)
    measure_anew()
    request = json.loads((folder / "request.json").read_text())
    # By a file: a port that was free when the processes were started may not be by the time that they are here.
    where, patience = f"file://{folder.absolute()}/meeting", timedelta(seconds=request["timeout"])
    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=patience)
    target: Any = AutoModelForCausalLM.from_pretrained(request["model"], tp_plan="auto", dtype=torch.float32).eval()
    inputs = {name: torch.tensor(rows) for name, rows in request["prompts"].items()}
    width, last = inputs["input_ids"].shape[1], rank == dist.get_world_size() - 1

    def answer(call: dict[str, Any]) -> dict[str, Any]:
        options = {**inputs, **request["options"], **call.get("options", {}), "return_dict_in_generate": True}
        if "ends" in call:
            options["logits_processor"] = LogitsProcessorList([_Ends(folder / "ended", call["ends"], last)])
        if "seeds" in call:
            torch.manual_seed(call["seeds"][rank])
        found = generate(target, assistant_models=list(call["levels"]), **options)
        passes = found.polyspec.levels[0].forward_passes
        placement = found.polyspec.placement.to_dict()
        return {"rows": found.sequences[:, width:].tolist(), "passes": passes, "placement": placement}

    for call in request["calls"]:
        _note(folder / f"seen-{rank}", call["name"], lambda call=call: answer(call))  # type: ignore[misc]


def _note(path: Path, name: str, call: Callable[[], dict[str, Any]]) -> None:
    try:
        found = call()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    with path.open("a") as file:
        file.write(json.dumps({"name": name, "at": time.time(), **found}) + "\n")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(os.environ["RANK"]))
