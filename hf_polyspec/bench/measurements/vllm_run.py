# SPDX-License-Identifier: Apache-2.0
"""One run of vLLM, in a process of its own: `python -m hf_polyspec.bench.measurements.vllm_run REQUEST ANSWER`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Greedy texts of vLLM.

    Args:
        request: `engine`, the arguments of `vllm.LLM`; `prompts`, lists of ids; `new_tokens`.

    Returns:
        `texts`, lists of new ids; `seconds` with the prompts read; `drafts` and `accepted` as vLLM counted them;
        `passes` and `tokens` as a proposer of ours did, None where it was another's.
    """
    # The engine runs in this process, so that what the proposer counted can be read.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from hf_polyspec.integrations import vllm as door

    engine = LLM(**request["engine"], disable_log_stats=False)
    rules = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"])
    began = time.perf_counter()
    answers = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], rules, use_tqdm=False)
    seconds = time.perf_counter() - began
    counted = {metric.name: getattr(metric, "value", None) for metric in engine.get_metrics()}
    ours = next(iter(door.LIVE), None)
    return {
        "texts": [list(answer.outputs[0].token_ids) for answer in answers],
        "seconds": seconds,
        "drafts": counted.get("vllm:spec_decode_num_drafts"),
        "accepted": counted.get("vllm:spec_decode_num_accepted_tokens"),
        "passes": None if ours is None else ours.histories.passes,
        "tokens": None if ours is None else ours.histories.tokens,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run(json.loads(Path(sys.argv[1]).read_text()))))
