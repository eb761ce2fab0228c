# SPDX-License-Identifier: Apache-2.0
"""What a model computed while it wrote a text, kept beside the text so that training need not read it again.

Writing a token and reading it cost about the same where arithmetic is what counts, as on a CPU. A shard's states lie
in a file of their own, which is there before the shard is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from hf_polyspec.eagle.features import select_features
from hf_polyspec.storage.atomic import write_tensors
from hf_polyspec.storage.reading import reading

_HALF_MAX = 65504.0
UNKNOWN = -1


@dataclass(frozen=True)
class Seen:
    """What a model made of a text of n ids. The last id is never fed, so nothing is known of it.

    Args:
        states: `[n - 1, F + H_t]` in half precision: what a head reads, then what the lm_head reads.
        best: `[n - 1]`, the most likely next id, `UNKNOWN` where the next one was given.
    """

    states: npt.NDArray[np.float16]
    best: npt.NDArray[np.int32]


def joined_states(hidden_states: Sequence[torch.Tensor | None], layers: Sequence[int]) -> torch.Tensor:
    """What a head and the lm_head read of a forward pass.

    Args:
        hidden_states: the model's, each `[B, T, H_t]`.
        layers: indices that the head reads.

    Returns:
        `[B, T, F + H_t]` in half precision on the CPU.
    """
    features, final = select_features(hidden_states, layers), select_features(hidden_states, [-1])
    return as_kept(torch.cat([features, final.to(features.device)], dim=-1))


def as_kept(states: torch.Tensor) -> torch.Tensor:
    """States in the precision in which they are kept on disk, on the CPU; no finite one becomes infinite."""
    return states.float().clamp(-_HALF_MAX, _HALF_MAX).half().cpu()


def identity(target: str, revision: str | None, model: str, layers: Sequence[int]) -> str:
    """Whose states they are: states serve a reader of the same identity.

    Args:
        target: name of the target; revision: on the hub.
        model: the `"target"` or its `"int8"` copy.
        layers: indices that the head reads.
    """
    return json.dumps([target, revision, model, list(layers)])


def save_seen(shard: Path, texts: Sequence[tuple[int, Seen]], whose: str) -> None:
    """Writes the states of a shard's texts.

    Args:
        shard: the shard's path; it does not exist yet.
        texts: sample numbers and what was seen of each.
        whose: see `identity`.
    """
    tensors: dict[str, npt.NDArray[Any]] = {
        "states": np.concatenate([seen.states for _, seen in texts]),
        "best": np.concatenate([seen.best for _, seen in texts]),
        "offsets": np.cumsum([0, *(len(seen.best) for _, seen in texts)]).astype(np.int64),
        "numbers": np.array([number for number, _ in texts], dtype=np.int64),
    }
    write_tensors(_beside(shard), tensors, {"identity": whose})


def read_seen(folder: Path, whose: str) -> Iterator[tuple[int, Seen]]:
    """Sample numbers and what was seen of each, of whole shards.

    Args:
        folder: a folder of shards.
        whose: see `identity`; states of others are passed over.

    Raises:
        DamagedFileError: a file cannot be read; the sentence names it.
    """
    for shard in sorted(folder.glob("shard-*.safetensors")):
        path = _beside(shard)
        if not path.is_file():
            continue
        with reading(path, "delete it: what it holds is computed again"):
            yield from _read(path, whose)


def _read(path: Path, whose: str) -> Iterator[tuple[int, Seen]]:
    with safe_open(path, framework="numpy") as handle:
        if handle.metadata()["identity"] != whose:
            return
        numbers, offsets, best = (handle.get_tensor(name) for name in ("numbers", "offsets", "best"))
        states = handle.get_slice("states")
        for number, start, end in zip(numbers.tolist(), offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            yield number, Seen(states[start:end], best[start:end])


def _beside(shard: Path) -> Path:
    return shard.with_name("states-" + shard.name.removeprefix("shard-"))
