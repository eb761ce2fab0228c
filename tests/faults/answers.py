# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while generate() answers with a cache that the caller brought: it is as it was, or complete."""

from __future__ import annotations

import copy
from types import CodeType

import torch
from tiny_models import noisy, prompts, tiny
from transformers import DynamicCache

import hf_polyspec
from hf_polyspec.host.release import GENERATION_CACHE

from .interrupts import in_room, interrupt_each

READ, PROMPT, NEW = 12, 16, 9


def interrupted(first: int, every: int, opcodes: bool = False) -> int:
    """Interrupt one answer again and again.

    Args:
        first: place of the first interrupt; every: places from one to the next.
        opcodes: at bytecodes, those of the room that writes callers' caches alone; at lines else, of all of
            `generation/` and `host/`.

    Returns:
        How many interrupts there were.
    """
    model = tiny("llama")
    chain = [noisy(model, 0.03, 1), noisy(model, 0.05, 2)]
    ids = prompts(1, PROMPT)["input_ids"]
    caches: dict[str, DynamicCache] = {}

    def filled(tokens: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens, use_cache=True, **{GENERATION_CACHE: cache})
        return cache

    def call() -> torch.Tensor:
        found: torch.Tensor = hf_polyspec.generate(
            model, input_ids=ids, attention_mask=torch.ones_like(ids), assistant_models=chain, max_new_tokens=NEW,
            do_sample=False, **{GENERATION_CACHE: caches["own"]},
        )  # fmt: skip
        return found

    def prepare() -> None:
        caches["own"] = copy.deepcopy(before)

    def check() -> None:
        lengths = {layer.keys.shape[2] for layer in caches["own"].layers}
        lengths |= {layer.values.shape[2] for layer in caches["own"].layers}
        assert lengths in ({READ}, {text.shape[1] - 1}), lengths
        (length,) = lengths
        for own, right in zip(caches["own"].layers, after.layers, strict=True):
            torch.testing.assert_close(own.keys, right.keys[:, :, :length], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own.values, right.values[:, :, :length], rtol=1e-4, atol=1e-4)

    def where(code: CodeType) -> bool:
        if opcodes:
            return code.co_filename.endswith("callers_cache.py")
        return in_room("generation")(code) or in_room("host")(code)

    before = filled(ids[:, :READ])
    prepare()
    text = call()
    after = filled(text)
    return interrupt_each(call, check, every, prepare=prepare, where=where, opcodes=opcodes, first=first)
