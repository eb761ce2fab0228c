# SPDX-License-Identifier: Apache-2.0
"""What replaying scans saves on targets with a recurrent state: `polyspec measure replay`.

Random models of a hybrid (Qwen3-Next, three layers of four with a state) and of Mamba-2 check drafts of which a given
share is accepted, token for token; nothing is drafted or judged, so that what is timed is the target's part of a round.
Three ways take turns: accepted tokens are fed again with the next draft, by scans in chunks of their file's own length;
the same in chunks as long as the draft; and scans are replayed. Medians of the turns, in milliseconds a round.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from ...exactness.context import Context, Prompt
from ...host.generation import quiet
from ...host.modeling import CONFIG_MAPPING, AutoModelForCausalLM
from ...host.recurrent import RecurrentRunner
from ...models.environment import describe
from ...storage.atomic import write_json
from ...telemetry.counters import LevelStats
from . import arguments
from .ways import in_turns, table_of

WAYS = {"fed again, the file's chunks": (False, False), "fed again": (True, False), "replayed": (True, True)}
"""Whether scans are as short as the draft, and whether they are replayed."""
WORDS, PROMPT, FIRST = 4096, 24, 2
"""Vocabulary; tokens of a prompt; rounds that do not count."""
LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]


@dataclass(frozen=True)
class Rate:
    """One way of one model.

    Attributes:
        kind: of model; parameters: it has; rows: beside each other; accepted: share of drafted tokens; way: of `WAYS`.
        milliseconds: of the target a round; columns, passes: of it a round, the prompt's left out.
    """

    kind: str
    parameters: int
    rows: int
    accepted: float
    way: str
    milliseconds: float
    columns: float
    passes: float


def built(kind: str, width: int, layers: int) -> Any:
    """A random model: `qwen3_next` or `mamba2`, of so many hidden numbers and layers."""
    heads = width // 64
    settings: dict[str, Any] = {
        "qwen3_next": {
            "intermediate_size": 11 * width // 4 // 64 * 64,
            "num_attention_heads": heads,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "layer_types": LAYERS * (layers // len(LAYERS)),
            "linear_num_value_heads": heads,
            "linear_num_key_heads": heads // 2,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "num_experts": 0,
            "mlp_only_layers": list(range(layers)),
        },
        "mamba2": {"state_size": 64, "num_heads": 2 * heads, "head_dim": 64, "n_groups": 1, "expand": 2},
    }
    config = CONFIG_MAPPING[kind](
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, tie_word_embeddings=True, **settings[kind]
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def measure(
    kind: str, model: Any, rows: int, accepted: float, *, draft: int = 5, rounds: int = 24, turns: int = 3
) -> list[Rate]:
    """Time rounds of a target in every way, in turns.

    Args:
        kind: name of the model's; rows: texts beside each other; accepted: share of the drafted tokens.
        draft: tokens of a draft; rounds: of each turn, of which all but the first count; turns: the median counts.
    """
    chance = random.Random(1)
    texts = [[chance.randrange(3, WORDS) for _ in range(PROMPT + (draft + 1) * (rounds + 1))] for _ in range(rows)]
    prompt = Prompt(PROMPT, None, torch.arange(PROMPT).expand(rows, -1))
    counted: dict[str, tuple[int, int]] = {}

    def timed(way: str, turn: int) -> float:
        dice, at, stats, fed = random.Random(7), [PROMPT] * rows, LevelStats("target", 0), list[int]()
        runner = RecurrentRunner(model, "the target", kept=1)
        runner.shortens, replays = WAYS[way]
        runner.replays &= replays
        seen = model.register_forward_pre_hook(
            lambda *call: fed.append(call[2]["input_ids"].shape[1]), with_kwargs=True
        )
        seconds = 0.0
        for count in range(rounds + 1):
            lucky = [[dice.random() < accepted for _ in range(draft)] for _ in texts]
            drafts = [
                [token if holds else 2 for token, holds in zip(ids[n : n + draft], row, strict=True)]
                for ids, n, row in zip(texts, at, lucky, strict=True)
            ]
            context = Context([ids[:n] for ids, n in zip(texts, at, strict=True)], prompt)
            start = time.perf_counter()
            runner.run(context, drafts, stats)
            seconds += time.perf_counter() - start if count >= FIRST else 0
            at = [n + 1 + (row.index(False) if False in row else draft) for n, row in zip(at, lucky, strict=True)]
        seen.remove()
        counted[way] = sum(fed[1:]), len(fed) - 1
        return 1000 * seconds / (rounds + 1 - FIRST)

    times = in_turns(timed, list(WAYS), turns)
    size = sum(parameter.numel() for parameter in model.parameters())
    return [
        Rate(kind, size, rows, accepted, way, median(found), *(one / (rounds + 1) for one in counted[way]))
        for way, found in times.items()
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        "polyspec measure replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", nargs="+", choices=["qwen3_next", "mamba2"], default=["qwen3_next", "mamba2"])
    parser.add_argument("--width", type=arguments.count, default=384, help="hidden numbers, a multiple of 128")
    parser.add_argument("--layers", type=arguments.count, default=8, help="a multiple of 4")
    parser.add_argument("--rows", nargs="+", type=arguments.count, default=[1, 4])
    parser.add_argument("--accepted", nargs="+", type=float, default=[0.6, 1.0], help="shares of drafted tokens")
    parser.add_argument("--rounds", type=arguments.count, default=24)
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(words)
    quiet()
    rates: list[Rate] = []
    for kind in given.kind:
        model = built(kind, given.width, given.layers)
        for rows in given.rows:
            for accepted in given.accepted:
                rates += measure(kind, model, rows, accepted, rounds=given.rounds)
    table = table_of("the target's part of a round, drafts of 5", ["million", "rows", "accepted", *WAYS, "saved"])
    for at in range(0, len(rates), len(WAYS)):
        ways = rates[at : at + len(WAYS)]
        first = ways[0]
        cells = [f"{one.milliseconds:.1f} ms, {one.columns:.1f} in {one.passes:.2f}" for one in ways]
        saved = f"{1 - ways[-1].milliseconds / ways[-2].milliseconds:.0%}"
        size = f"{first.parameters / 1e6:.0f}"
        table.add_row(first.kind, size, f"{first.rows}", f"{first.accepted:.0%}", *cells, saved)
    console = Console(width=140)
    console.print(table)
    console.print("ms, columns in passes; saved: by replaying, of the column before", highlight=False)
    console.print(f"medians of 3 turns of {given.rounds} rounds; {describe()}", highlight=False)
    if given.json is not None:
        write_json(given.json, {"rates": [asdict(one) for one in rates], "machine": describe()})
