# SPDX-License-Identifier: Apache-2.0
"""Levels that carry a state, under and above levels that do not, emit the target's law exactly: every outcome of every
coin, total variation below 1e-9.

The runner, its pictures of states and its cache are the real ones. The model has one layer with a state and the window
of a convolution and one of attention, and what it says behind a token is a law of what all three hold: behind the right
ones that of the text, behind any other something else.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken_states import break_rollback, nothing, windows
from enumeration import EXACT, OneChoice, TableModel, approximations, emitted_law, sampling, total_variation, true_law
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_polyspec.host.recurrent import RecurrentRunner
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.verifier import Verifier

VOCABULARY, LENGTH, WINDOW = 2, 4, 2
START = (0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1)
"""Long enough that a state of it is kept: less is read again with every draft."""

_texts: list[tuple[int, ...]] = [()]


class Carrying(nn.Module):
    """A model whose state is the number of the text that it has read."""

    def __init__(self, table: TableModel) -> None:
        super().__init__()
        self.table = table
        self.embedding = nn.Embedding(VOCABULARY, 1)
        kinds = ["linear_attention", "full_attention"]
        self.config = CONFIG_MAPPING["qwen3_next"](num_hidden_layers=2, layer_types=kinds, vocab_size=VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Any:
        layer = past_key_values.layers[0]
        state, convolved = layer.recurrent_states[0], layer.conv_states[0]
        text = () if state is None or not layer.has_previous_state[0] else _texts[int(state[0, 0])]
        window = [-1.0] * WINDOW if not text else convolved[0, 0].tolist()
        new = input_ids.double()[:, None, :, None]  # [1, 1, F, 1]
        seen = past_key_values.update(new, new, 1)[0][0, 0, :, 0].tolist()
        logits = []
        for place, token in enumerate(input_ids[0].tolist()):
            text, window = (*text, token), [*window[1:], float(token)]
            keys = seen[: len(seen) - input_ids.shape[1] + place + 1]
            right = keys == list(map(float, text)) and window == keys[-WINDOW:]
            logits.append(self.table.logits(text if right else (*text, 9, *map(int, window), 9, *map(int, keys))))
        if text not in _texts:
            _texts.append(text)
        past_key_values.update_conv_state(torch.tensor([[window]], dtype=torch.float64), 0)
        past_key_values.update_recurrent_state(torch.tensor([[float(_texts.index(text))]]), 0)
        return SimpleNamespace(logits=torch.stack(logits)[None])


def _runner(table: TableModel, kind: str) -> Any:
    return RecurrentRunner(Carrying(table).eval(), "carrying") if kind == "s" else table


def _distance(order: str, rule: str) -> float:
    """Total variation between what a chain emits and its target's law; s for a state, a for attention."""
    tables = approximations(len(order), VOCABULARY, 3)
    runners = [_runner(table, kind) for table, kind in zip(tables, order, strict=True)]
    level: Drafter = OneChoice(CausalLMDrafter(runners[-1], name="drafter", draft_tokens=2))
    for runner in runners[-2:0:-1]:
        level = OneChoice(Verifier(runner, level, name="middle", block_size=2, rule=rule))
    top = Verifier(runners[0], level, name="target", rule=rule)
    top.begin(0, 1, VOCABULARY)
    emitted = emitted_law(top, sampling(), START, LENGTH)
    return total_variation(emitted, true_law(tables[0], START, LENGTH))


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("order", ["sa", "as", "asa", "sas"])
def test_the_law_is_the_targets(order: str, rule: str) -> None:
    assert _distance(order, rule) < EXACT


@pytest.mark.parametrize("wrong", [nothing, windows], ids=["none", "window"])
@pytest.mark.parametrize("order", ["sa", "sas"])
def test_a_state_that_comes_back_wrong_is_caught(order: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    break_rollback(monkeypatch, wrong)
    assert _distance(order, "token") > 0.01
