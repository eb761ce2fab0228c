# SPDX-License-Identifier: Apache-2.0
"""vLLM in a process of its own, for `polyspec measure peers`: run by its path, in an environment that holds vLLM alone.

Reads lines of JSON from its input: the arguments of `vllm.LLM` first, then one batch after another, `prompts` (lists of
ids) and `new_tokens`. Answers each with a line: its version, then `seconds` and `texts`, new ids of greedy texts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TextIO


def serve(asked: TextIO, told: TextIO) -> None:
    """Answer until nobody asks any more."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    engine = vllm.LLM(**json.loads(asked.readline()))
    _tell(told, {"version": vllm.__version__})
    for line in asked:
        batch = json.loads(line)
        rules = vllm.SamplingParams(temperature=0.0, max_tokens=batch["new_tokens"])
        prompts = [{"prompt_token_ids": ids} for ids in batch["prompts"]]
        began = time.perf_counter()
        answers = engine.generate(prompts, rules, use_tqdm=False)
        seconds = time.perf_counter() - began
        _tell(told, {"seconds": seconds, "texts": [list(answer.outputs[0].token_ids) for answer in answers]})


def _tell(told: TextIO, answer: object) -> None:
    told.write(json.dumps(answer) + "\n")
    told.flush()


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints is no answer
    serve(sys.stdin, channel)
