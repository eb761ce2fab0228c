# SPDX-License-Identifier: Apache-2.0
"""What every process of `test_spread_weights.py` does; run as a script."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from ranks import Notes, meet
from tiny_models import head_for, noisy, prompts, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LogitsProcessor

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


class Ends(LogitsProcessor):
    """Fails, or ends its process, at the third step."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.steps = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps == 3 and self.fails:
            raise ValueError("enough")
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores


def own(rank: int) -> dict[str, Any]:
    """Prompts and options of one process: other ids, another number of rows, another length."""
    return {**prompts(1 + rank, 9, seed=3 + rank), **PLAIN, "max_new_tokens": 6 + 5 * rank}


def apart(notes: Notes, rank: int) -> None:
    """A target by FSDP2, of which each process generates by itself."""
    target, whole = spread(), made()
    small = noisy(whole, 0.05)
    how = own(rank)

    def chain(*levels: Any, **options: Any) -> Any:
        return hf_polyspec.generate(target, **{**how, **options}, assistant_models=list(levels))

    notes.put("FSDP2, suffix", lambda: chain(SuffixDrafter()))
    notes.put("FSDP2, a small model", lambda: chain(small))
    notes.put("FSDP2, int8 over suffix", lambda: chain("int8", SuffixDrafter()))
    notes.put("FSDP2, synced_gpus", lambda: chain(small, synced_gpus=True))
    notes.put("FSDP2, online", lambda: chain(small, SuffixDrafter(), polyspec_control="online"))
    torch.manual_seed(5 + rank)
    notes.put("FSDP2, sampled", lambda: chain(small, do_sample=True))
    notes.put("FSDP2, auto", lambda: hf_polyspec.generate(target, **how, assistant_models="auto"))
    notes.put("FSDP2, a head", lambda: chain(head_for(whole)))
    notes.put("FSDP2, a head in trees", lambda: chain(head_for(whole), polyspec_tree_tokens=6))
    notes.put("FSDP2, int8 over a head", lambda: chain("int8", head_for(whole)))
    with torch.no_grad():
        target.model.embed_tokens.weight.mul_(1.25)  # where all processes hold no more than before
    notes.put("FSDP2, a head in one", lambda: chain(SuffixDrafter() if rank else head_for(whole)))
    notes.put("FSDP2, a head in the other", lambda: chain(head_for(whole) if rank else SuffixDrafter()))
    with torch.no_grad():
        target.model.embed_tokens.weight.div_(1.25)
    notes.put("FSDP2, an early exit", lambda: chain("early-exit:1"))
    notes.put("FSDP2, refused in one", lambda: chain(small, num_assistant_tokens=0 if rank else 2))
    notes.put("FSDP2, fails in one", lambda: chain(small, logits_processor=None if rank else [Ends(True)]))
    notes.put("FSDP2, all is well", lambda: chain(small))
    notes.put("plain by FSDP2", lambda: target.generate(**PROMPTS, **PLAIN))
    notes.put("FSDP2, ends in one", lambda: chain(small, logits_processor=None if rank else [Ends(False)]))


def meshes(notes: Notes, rank: int) -> None:
    """Of four processes every two share a target by tensor parallelism, beside two others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pair, target, whole = rank // 2, made(), made()
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {f"self_attn.{name}_proj": columns for name in "qkv"} | {"self_attn.o_proj": rows}
    plan |= {f"mlp.{name}_proj": columns for name in ("gate", "up")} | {"mlp.down_proj": rows}
    for layer in target.model.layers:
        parallelize_module(layer, mesh["tp"], plan)
    how = own(pair)

    def chain(*levels: Any, **options: Any) -> Any:
        return hf_polyspec.generate(target, **{**how, **options}, assistant_models=list(levels))

    notes.put("a pair", lambda: chain(noisy(whole, 0.05)))
    notes.put("a pair over a copy", lambda: chain("int8", SuffixDrafter()))
    torch.manual_seed(5 + rank)
    options = {"do_sample": True, "polyspec_verification": "block"}
    notes.put("a pair, drawn", lambda: chain(noisy(whole, 0.05), **options))


def everything(notes: Notes, rank: int) -> None:
    target, whole, wrapper = spread(), made(), flat()
    notes.put("the target in FSDP1's wrapper", lambda: text(wrapper, SuffixDrafter()))
    notes.put("a level by FSDP2", lambda: text(whole, target))
    notes.put("synced_gpus", lambda: text(whole, SuffixDrafter(), synced_gpus=True))
    notes.put("a mesh of two dimensions", lambda: text(square(), SuffixDrafter()))
    notes.put("gathered of FSDP1", lambda: gathered(wrapper, "int8", SuffixDrafter()))
    notes.put("unwrapped of DDP", lambda: text(extract_model_from_parallel(data_parallel()), "int8", SuffixDrafter()))
    # Each process generates by itself where it holds a whole model, as often as it likes.
    notes.put("of each one's own", lambda: [text(whole, SuffixDrafter()).tolist() for _ in range(1 + rank)][-1])
    apart(notes, rank)


if __name__ == "__main__":
    place, task, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    meet(place, task)
    globals()[task](Notes(place, task, number), number)
