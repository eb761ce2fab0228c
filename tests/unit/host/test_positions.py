# SPDX-License-Identifier: Apache-2.0
"""Where a model's positions end, and that the end cuts drafts and never the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.errors import LevelError
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host.positions import PositionTable, position_table
from hf_polyspec.host.release import forward_arguments

ROWS = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": ROWS},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
}
WITH_END = ["gpt2", "gpt_neo", "opt", "biogpt", "gptj", "codegen", "gpt_bigcode", "openai-gpt", "ctrl", "mpt", "bert"]
WITHOUT_END = ["llama", "gpt_neox", "falcon", "xglm", "gemma3_text", "phi"]


EAGER = {"codegen", "gpt_neo", "gptj", "mpt", "openai-gpt", "xglm"}  # of the oldest release, too


def model_of(kind: str, rows: int = ROWS, seed: int = 0) -> PreTrainedModel:
    settings = {"max_position_embeddings": rows, **SETTINGS.get(kind, {})}
    settings |= {"max_seq_len": rows} if kind == "mpt" else {}
    return tiny(kind, seed=seed, attention="eager" if kind in EAGER else "sdpa", **settings)


@torch.no_grad()
def reads(model: PreTrainedModel, length: int) -> bool:
    """Whether a pass over so many tokens goes through."""
    ids = torch.randint(3, 48, (1, length), generator=torch.Generator().manual_seed(1))
    positions = {"position_ids": torch.arange(length)[None]} if "position_ids" in forward_arguments(model) else {}
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **positions)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", WITH_END)
def test_the_end_is_where_a_pass_begins_to_fail(kind):
    model = model_of(kind)
    table = position_table(model)
    assert table is not None
    assert reads(model, table.rows)
    assert not reads(model, table.rows + 1)


@pytest.mark.parametrize("kind", WITHOUT_END)
def test_models_that_compute_positions_have_no_end(kind):
    model = model_of(kind)
    assert position_table(model) is None
    assert reads(model, 2 * ROWS)


def context(lengths: list[int], padding: list[int], hidden: int = 0) -> Context:
    """Rows of so many ids, of which the first ones are padding."""
    width = min(lengths)
    mask = torch.tensor([[int(i >= p) for i in range(width)] for p in padding])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return Context([[5] * n for n in lengths], Prompt(width, mask, positions, hidden=hidden))


def test_room_is_counted_by_position_or_by_column():
    rows = context([8, 10], [0, 4])
    assert PositionTable(12, False).within(rows, [9, 9]) == [5, 7]
    assert PositionTable(12, True).within(rows, [9, 9]) == [3, 3]
    assert PositionTable(12, False).within(rows, [2, 0]) == [2, 0]
    assert PositionTable(7, False).within(rows, [9, 9]) == [0, 2], "a row past the end says nothing"
    assert PositionTable(8, False).within(rows, [9, 9]) == [1, 3], "the last token said need not be fed"
    assert PositionTable(12, False).within(context([8, 10], [0, 4], hidden=2), [9, 9]) == [5, 5]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj", "mpt", "bert"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_text_fills_the_table_to_the_last_row(kind, batch):
    """The longest text that plain generation can write, with drafts that would reach beyond it."""
    target = model_of(kind)
    inputs = prompts(batch)
    room = ROWS + 1 - inputs["input_ids"].shape[1]
    plain = target.generate(**inputs, max_new_tokens=room, do_sample=False)
    for chain in ([noisy(target, 0.0)], [hf_polyspec.SuffixDrafter()], [noisy(target), hf_polyspec.SuffixDrafter()]):
        # A limit beyond the table, and an end of text in time: the table alone cuts the drafts.
        end = int(plain[0, -1])
        early = target.generate(**inputs, max_new_tokens=room, do_sample=False, eos_token_id=end)
        more = {"eos_token_id": end, "max_new_tokens": room if batch > 1 else 2 * ROWS}
        found = hf_polyspec.generate(target, **inputs, do_sample=False, **more, assistant_models=chain)
        assert found.tolist() == early.tolist()


def test_a_text_that_does_not_fit_fails_as_in_plain_generation():
    target = model_of("gpt2")
    options = {**prompts(1), "max_new_tokens": ROWS, "do_sample": False}
    with pytest.raises(IndexError):
        target.generate(**options)
    with pytest.raises((IndexError, LevelError), match="out of range"):
        hf_polyspec.generate(target, **options, assistant_models=[noisy(target)])


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mpt"])
@pytest.mark.parametrize("rows", [4, 12, 16])
@pytest.mark.parametrize("place", ["drafter", "middle"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_assistant_with_fewer_positions_falls_silent_where_they_end(kind, rows, place, batch):
    target = tiny("llama")
    short = model_of(kind, rows, seed=3)
    chain = [short] if place == "drafter" else [short, hf_polyspec.SuffixDrafter()]
    options = {**prompts(batch), "max_new_tokens": 20, "do_sample": False}
    out = hf_polyspec.generate(target, **options, assistant_models=chain, return_dict_in_generate=True)
    assert out.sequences.tolist() == target.generate(**options).tolist()
    if rows > 9 or batch == 1:  # rows that begin with padding have fewer positions than columns
        assert (out.polyspec.levels[1].forward_passes > 0) == (rows > 9)
