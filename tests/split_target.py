# SPDX-License-Identifier: Apache-2.0
"""What every process of `test_tensor_parallel.py` does; run as a script."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from companion_models import dflash
from ranks import Notes, run_task
from tiny_models import head_for, noisy, prompts
from torch import nn
from transformers import AutoModelForCausalLM, LogitsProcessor, StoppingCriteria, modeling_layers

import hf_polyspec
from hf_polyspec import SuffixDrafter
from hf_polyspec.control import Costs, steady
from hf_polyspec.control.pass_seconds import PassSeconds
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.generation import decoding
from hf_polyspec.host.mtp import MtpLayers
from hf_polyspec.host.ranks import is_split
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.mtp import MtpDrafter

PROMPTS = prompts(12, 9)
PLAIN: dict[str, Any] = {"max_new_tokens": 14, "pad_token_id": 0, "do_sample": False}
SEED = 7
BESIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
SAMPLED: dict[str, Any] = {**PLAIN, "do_sample": True, "temperature": 0.7}


@torch.no_grad()
def change(target: Any) -> None:
    """Other weights, and another text."""
    for name, weight in target.named_parameters():
        if "layernorm" in name:
            weight.mul_(torch.linspace(0.2, 2.0, len(weight)))


def split(folder: str, name: str = "target") -> Any:
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", tp_plan="auto").eval()


def whole(folder: str, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}").eval()


class Failing(Drafter):
    """Drafts twice, and then runs out of luck."""

    name = "failing"

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def propose(self, context: Any, limits: list[int], law: Any) -> Proposal:
        self.asked += 1
        if self.asked > 2:
            raise RuntimeError("out of luck")
        tokens = [[5, 6][:limit] for limit in limits]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


class Asked(LogitsProcessor):
    """Lets one process write something else from its third step on, have no law at all, or end itself."""

    def __init__(self, at: int, ends: bool = False, lawless: bool = False) -> None:
        self.at = at
        self.ends = ends
        self.lawless = lawless
        self.steps = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        if self.steps <= 3 or int(os.environ["RANK"]) != self.at:
            return scores
        if self.ends:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores * float("nan") if self.lawless else -scores


class Counting(LogitsProcessor):
    """Keeps a state: makes another id unlikely at every step."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        scores = scores.clone()
        scores[:, self.steps % scores.shape[1]] -= 5
        return scores


class After(StoppingCriteria):
    """Ends all rows after so many tokens, as a clock might, another number in every process."""

    def __init__(self, tokens: int) -> None:
        self.length = PROMPTS["input_ids"].shape[1] + tokens

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= self.length)


class Unhurried(steady.SteadyControl):
    """Nothing takes any time, and the whole chain runs at first."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, clock=lambda: 0.0, **more)
        self.standing.place = 0


def split_levels(folder: str) -> dict[str, list[Any]]:
    """Chains below the target of which several levels are split, and one of which none is."""
    return {
        "int8 over a head": ["int8", head_for(whole(folder, "target"))],
        "split over suffix": [split(folder, "alike"), SuffixDrafter()],
        "split over split": [split(folder, "alike"), "early-exit:1"],
    }


class Texts:
    """Calls of one target."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __call__(self, *levels: Any, inputs: Any = PROMPTS, **options: Any) -> Any:
        split = [str(one).startswith("early-exit") or (isinstance(one, nn.Module) and is_split(one)) for one in levels]
        # What is measured to be quickest is another test's matter.
        options["polyspec_placement"] = ["sharded" if one else "one" for one in split]
        return hf_polyspec.generate(self.target, **inputs, **{**PLAIN, **options}, assistant_models=list(levels))


def chains(folder: str, notes: Notes, rank: int) -> None:
    """Every kind of chain."""
    target, small = split(folder), whole(folder, "small")
    head, text = head_for(whole(folder, "target")), Texts(target)
    notes.put("plain", lambda: target.generate(**PROMPTS, **PLAIN))
    notes.put("a small model", lambda: text(small))
    notes.put("suffix", lambda: text(SuffixDrafter()))
    notes.put("int8 over suffix", lambda: text("int8", SuffixDrafter()))
    notes.put("int4 over a small model", lambda: text("int4", small))
    notes.put("a head", lambda: text(head))
    notes.put("a head in trees", lambda: text(head, polyspec_tree_tokens=6))
    notes.put("int8 over a head and suffix", lambda: text("int8", head, SuffixDrafter(), polyspec_tree_tokens=6))
    notes.put("an early exit, which is split", lambda: text("early-exit:1"))
    notes.put("a split middle over suffix", lambda: text(split(folder, "alike"), SuffixDrafter()))
    notes.put("online", lambda: text(small, SuffixDrafter(), polyspec_control="online"))
    online: dict[str, Any] = {"polyspec_control": "online", "max_new_tokens": 60}
    for name, levels in split_levels(folder).items():
        notes.put(f"online, {name}", lambda levels=levels: text(*levels, **online))
    torch.manual_seed(7)
    notes.put("sampled, one seed", lambda: text("int8", small, **SAMPLED))
    torch.manual_seed(7 if rank == 0 else 8)
    notes.put("sampled, other seeds", lambda: text(head, **SAMPLED))
    notes.put("the next number", lambda: int(torch.randint(1 << 30, ())))
    notes.put("a seed of the call's own", lambda: text(small, polyspec_seed=7, **SAMPLED))
    told = text("int8", small, return_dict_in_generate=True).polyspec
    notes.put("statistics", lambda: [told.new_tokens, [(one.name, one.forward_passes) for one in told.levels]])


def beside(folder: str, notes: Notes, rank: int) -> None:
    """Drafters that compute with the split target's own embedding and lm_head."""
    target = split(folder)
    text, vocabulary = Texts(target), target.config.vocab_size
    notes.put("a block-diffusion drafter", lambda: text(dflash(vocabulary, **BESIDE)))
    notes.put("and under a split middle", lambda: text(split(folder, "alike"), dflash(vocabulary, **BESIDE)))
    target.config.num_mtp_layers = 2
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = MtpLayers(modeling_layers.MtpModel(target, 2).eval())
    notes.put("mtp", lambda: text(MtpDrafter(layers)))
    change(target)
    notes.put("mtp, changed", lambda: text(MtpDrafter(layers)))


def drawn_chains(folder: str, text: Texts, load: Callable[[str, str], Any]) -> dict[str, Callable[[], Any]]:
    """Chains whose levels draw by themselves, under a target that is split or is not.

    Args:
        load: loads what is split where the target is.
    """
    small, alike, head = whole(folder, "small"), load(folder, "alike"), head_for(whole(folder, "target"))
    token, block = {"polyspec_verification": "token"}, {"polyspec_verification": "block"}
    tree = {"polyspec_tree_tokens": 6, "num_assistant_tokens": 3}
    lossy = {"polyspec_bias_budget": 0.5}
    return {
        "token": lambda: text(small, **SAMPLED, **token),
        "block": lambda: text(small, **SAMPLED, **block),
        "a middle that draws": lambda: text(noisy(whole(folder, "target"), 0.05), small, **SAMPLED, **block),
        "a split middle that draws": lambda: text(alike, small, **SAMPLED, **block),
        "a split drafter": lambda: text("early-exit:1", **SAMPLED, **token),
        "a drawn tree": lambda: text(head, **SAMPLED, **token, **tree),
        "in order": lambda: text(small, logits_processor=[Counting()], **SAMPLED, **token),
        "a bias budget": lambda: text(small, **SAMPLED, **lossy),
        "a seed": lambda: text(small, polyspec_seed=11, **SAMPLED, **token),
    }


def draws(folder: str, notes: Notes, rank: int) -> None:
    """Levels that draw by themselves, the generators of the processes standing apart."""
    text = Texts(split(folder))
    for name, call in drawn_chains(folder, text, split).items():
        torch.manual_seed(SEED + rank)
        notes.put(name, call)
        notes.put(f"the next number after {name}", lambda: int(torch.randint(1 << 30, ())))
    torch.manual_seed(SEED)
    options = {**SAMPLED, "polyspec_verification": "token", "logits_processor": [Asked(0, lawless=True)]}
    notes.put("nothing to draw from", lambda: text(whole(folder, "small"), **options))
    notes.put("well again", lambda: text(whole(folder, "small")))


def automatic(folder: str, notes: Notes, rank: int) -> None:
    """What pays is measured together."""
    os.environ["XDG_CACHE_HOME"] = cache = f"{folder}/cache-{rank}"
    target = split(folder)

    def chosen(**options: Any) -> Any:
        found = hf_polyspec.generate(
            target, **PROMPTS, **{**PLAIN, **options}, assistant_models="auto", return_dict_in_generate=True
        )
        lines.append(found.polyspec.chosen)
        return found.sequences

    lines: list[str] = []
    notes.put("auto", chosen)
    torch.manual_seed(SEED + rank)
    notes.put("auto, sampled", lambda: chosen(**SAMPLED))
    change(target)
    notes.put("auto, changed", chosen)
    notes.put("lines", lambda: lines)
    other = prompts(12, 9, seed=3 + rank)
    alone: dict[str, Any] = {name: rows[:1] for name, rows in PROMPTS.items()}
    alone["input_ids"] = torch.tensor([[5, 6, 7, 8] * 3])  # a suffix drafter finds something
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])

    def drafted() -> tuple[Any, int]:
        found = hf_polyspec.generate(
            target, **alone, **PLAIN, assistant_models="auto", return_dict_in_generate=True
        )  # fmt: skip
        return found.sequences.tolist(), found.polyspec.levels[-1].drafted

    # What two processes and this machine's clock have found to pay is another matter.
    decoding.SteadyControl = Unhurried  # type: ignore[misc]
    Costs.seconds = lambda self, level, columns: 1.0  # type: ignore[method-assign]
    notes.put("auto in one row", drafted)
    # Beside a pass of one column, any other is too dear.
    steady.SteadyControl._checked = lambda self, above, columns: columns**4  # type: ignore[method-assign]
    notes.put("auto in one row, where no token pays", drafted)
    PassSeconds.seconds = lambda self, columns: columns**4  # type: ignore[method-assign]
    notes.put("auto, where no token pays", chosen)
    notes.put("auto, other prompts", lambda: hf_polyspec.generate(target, **other, **PLAIN, assistant_models="auto"))
    notes.put("auto in one", lambda: Texts(target)() if rank else chosen())
    notes.put("profiles", lambda: sum(name.endswith(".json") for _, _, found in os.walk(cache) for name in found))


def decisions(folder: str, notes: Notes, rank: int) -> None:
    """What the processes decide apart, and what goes wrong in one of them; at the end one is killed."""
    target, small = split(folder), whole(folder, "small")
    text = Texts(target)
    notes.put("a criterion", lambda: text(small, stopping_criteria=[After(5 if rank == 0 else 3)]))
    notes.put("no time", lambda: text(small, max_time=1e-9 if rank == 0 else 1e9))
    other = prompts(12, 9, seed=3 + rank)
    notes.put("other prompts", lambda: text(small, inputs=other))
    notes.put("other lengths", lambda: text(small, max_new_tokens=14 + rank))
    notes.put("refused in one", lambda: text("no such thing" if rank else small))
    notes.put("an engine", lambda: hf_polyspec.Engine(target, assistant_models=[small]))
    notes.put("uneven", lambda: Texts(split(folder, "uneven"))(SuffixDrafter()))
    notes.put("a level that fails", lambda: text(Failing()))
    notes.put("parted ways", lambda: text(small, logits_processor=[Asked(1)]))
    notes.put("all is well", lambda: text(small))
    notes.put("killed", lambda: text(small, logits_processor=[Asked(1, ends=True)]))


def everything(folder: str, notes: Notes, rank: int) -> None:
    chains(folder, notes, rank)
    beside(folder, notes, rank)
    draws(folder, notes, rank)
    automatic(folder, notes, rank)
    decisions(folder, notes, rank)


if __name__ == "__main__":
    run_task(globals())
