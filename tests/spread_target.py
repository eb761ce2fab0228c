# SPDX-License-Identifier: Apache-2.0
"""What every process of `test_spread_weights.py` does; run as a script."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from ranks import Notes
from tiny_models import prompts, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

import hf_polyspec
from hf_polyspec import SuffixDrafter

PLAIN: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
PROMPTS = prompts(2, 9)


def made() -> Any:
    return tiny("llama", num_hidden_layers=2)


def spread() -> Any:
    """By FSDP2, layer by layer."""
    model = made()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def square() -> Any:
    """Over a mesh of two dimensions."""
    model = made()
    mesh = init_device_mesh("cpu", (1, 2))
    head = model.lm_head
    part = DTensor.from_local(head.weight.data.chunk(2)[dist.get_rank()], mesh, [Replicate(), Shard(0)])
    head.weight = torch.nn.Parameter(part, requires_grad=False)
    return model


def flat() -> Any:
    """Inside FSDP1's wrapper, whose flat weights are those of all layers together."""
    return FullyShardedDataParallel(made(), device_id=torch.device("cpu"))


def text(target: Any, *levels: Any, **options: Any) -> Any:
    return hf_polyspec.generate(target, **PROMPTS, **PLAIN, **options, assistant_models=list(levels))


def data_parallel() -> Any:
    """As trainers wrap it that hold the whole model in every process; accelerate unwraps it to generate."""
    return DistributedDataParallel(made().requires_grad_(True))


def gathered(wrapper: Any, *levels: Any) -> Any:
    """As trainers do before they generate."""
    with FullyShardedDataParallel.summon_full_params(wrapper, writeback=False):
        return text(wrapper.module, *levels)


def everything(notes: Notes, rank: int) -> None:
    target, whole, wrapper = spread(), made(), flat()
    notes.put("the target by FSDP2", lambda: text(target, SuffixDrafter()))
    notes.put("by FSDP2 over a copy", lambda: text(target, "int8"))
    notes.put("by FSDP2, auto", lambda: hf_polyspec.generate(target, **PROMPTS, **PLAIN, assistant_models="auto"))
    notes.put("the target in FSDP1's wrapper", lambda: text(wrapper, SuffixDrafter()))
    notes.put("a level by FSDP2", lambda: text(whole, target))
    notes.put("synced_gpus", lambda: text(whole, SuffixDrafter(), synced_gpus=True))
    notes.put("a mesh of two dimensions", lambda: text(square(), SuffixDrafter()))
    notes.put("plain by FSDP2", lambda: target.generate(**PROMPTS, **PLAIN))
    notes.put("gathered of FSDP1", lambda: gathered(wrapper, "int8", SuffixDrafter()))
    notes.put("unwrapped of DDP", lambda: text(extract_model_from_parallel(data_parallel()), "int8", SuffixDrafter()))
    # Each process generates by itself where it holds a whole model, as often as it likes.
    notes.put("of each one's own", lambda: [text(whole, SuffixDrafter()).tolist() for _ in range(1 + rank)][-1])


if __name__ == "__main__":
    place, task, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo")
    globals()[task](Notes(place, task, number), number)
