# SPDX-License-Identifier: Apache-2.0
"""The target's own generation config, for one call of plain `generate()` of a given length and temperature."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig


def generation_config(
    target: Any, new_tokens: int, temperature: float, pad_token_id: int | None = None
) -> GenerationConfig:
    """A copy of the target's configuration at this length and temperature; the target keeps its own.

    Args:
        target: a model; new_tokens: at most so many, 1 or more; temperature: 0 is greedy.
        pad_token_id: for a target that names none; else the first of the ids that end its texts.
    """
    config: GenerationConfig = copy.deepcopy(target.generation_config)
    config.max_length = None
    config.max_new_tokens = new_tokens
    config.return_dict_in_generate = True
    config.do_sample = temperature > 0
    if config.do_sample:
        config.temperature = temperature
    else:
        config.temperature = config.top_p = config.top_k = config.min_p = None
    if config.pad_token_id is None:
        ends = config.eos_token_id
        first = ends[0] if isinstance(ends, list) else ends
        config.pad_token_id = first if pad_token_id is None else pad_token_id
    return config
