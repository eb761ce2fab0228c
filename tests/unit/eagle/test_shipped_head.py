# SPDX-License-Identifier: Apache-2.0
"""The head that ships with the package is small, whole, and reached by its name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_polyspec.cli.demo import default_assistants
from hf_polyspec.eagle import bind
from hf_polyspec.models.assistants import is_eagle_head, load_assistant
from hf_polyspec.models.by_name import resolve
from hf_polyspec.models.packaged import HEAD, PACKAGE, head_folder

# SmolLM2-135M-Instruct's shape; two layers of it carry the head as well as thirty
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def test_it_is_small_and_tells_how_it_was_made() -> None:
    folder = head_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    assert {"README.md", "training.yaml", "curve.csv", "curve.png", "validation.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    card = (folder / "README.md").read_text(encoding="utf-8")
    last = json.loads((folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    # the card says what was measured, not more
    assert f"{last['greedy']['top1'][0]:.3f}" in card
    assert f"{last['greedy']['mean_acceptance_length']:.2f}" in card


def test_its_name_leads_to_it() -> None:
    assert Path(resolve(HEAD)[0]) == head_folder()
    assert is_eagle_head(HEAD)
    assert HEAD in default_assistants(PACKAGE)
    assert HEAD not in default_assistants("another-model")


def test_it_fits_a_model_of_the_shape_of_its_target() -> None:
    config = LlamaConfig(vocab_size=49152, num_hidden_layers=30, tie_word_embeddings=True, **SHAPE)
    with torch.device("meta"):
        target = LlamaForCausalLM(config)
    target = target.to_empty(device="cpu")
    head = bind(load_assistant(HEAD, target, "auto", "cpu"), target)
    assert head.dtype == target.dtype == torch.float32  # stored in 16 bits, run as its target runs
    ids = head.target_ids()
    assert len(ids) == len(set(ids.tolist())) == head.config.draft_vocab_size
    assert 2 in ids.tolist()  # the id that ends an answer
    assert set(head.config.frequent_tokens) <= set(ids.tolist())
    assert all(torch.isfinite(weight.float()).all() for weight in head.parameters())
