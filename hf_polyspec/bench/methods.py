# SPDX-License-Identifier: Apache-2.0
"""Ways of decoding by name: what a user writes after `--methods`.

    plain                          generate() as a user runs it
    plain-packed                   the same with the target packed (hf_polyspec.pack), as our chains have it
    hf:prompt-lookup               transformers' assisted generation with n-grams of the prompt
    hf:assisted:NAME               transformers' assisted generation with an assistant of the run
    hf:early-exit:LAYERS           transformers' assisted generation with the target's own first layers
    polyspec:NAME,NAME             a chain of the run's assistants, the slowest first
    polyspec:none                  a chain without assistants: the target alone in this package's loop
    polyspec:auto                  assistant_models="auto", on the target as a user has it
    planned                        the chain of the plan given with --plan

Options follow an @: `polyspec:int8,suffix@block=12,draft=6`, `polyspec:suffix@control=online`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from ..generation.options import PolySpecOptions
from ..models.assistants import AUTO, NONE

PLAIN = "plain"
PACKED = "plain-packed"
PROMPT_LOOKUP = "hf:prompt-lookup"
ASSISTED = "hf:assisted"
EARLY_EXIT = "hf:early-exit"
CHAIN = "polyspec"
PLANNED = "planned"
KINDS = (PLAIN, PACKED, PROMPT_LOOKUP, ASSISTED, EARLY_EXIT, CHAIN, PLANNED)
PEERS = (PLAIN, PACKED, PROMPT_LOOKUP, ASSISTED, EARLY_EXIT)

OPTIONS = {
    "block": "polyspec_block_size",
    "direct": "polyspec_direct_tokens",
    "draft": "num_assistant_tokens",
    "tree": "polyspec_tree_tokens",
    "depth": "polyspec_tree_depth",
    "topk": "polyspec_tree_top_k",
    "verification": "polyspec_verification",
    "control": "polyspec_control",
    "confidence": "assistant_confidence_threshold",
    "draft-temperature": "polyspec_draft_temperature",
    "copies": "polyspec_draft_copies",
}
"""Short names for the options of a chain."""


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(text)
    return text == "yes"


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "verification": (str, "a word"),
    "control": (str, "a word"),
    "confidence": (float, "a number"),
    "draft-temperature": (float, "a number"),
    "copies": (_yes, "yes or no"),
}
"""How values are read, and what to call them; those of other options are whole numbers."""
_WHOLE: tuple[Callable[[str], Any], str] = (_whole, "a whole number")
LONGEST_CHAIN = 3
_ONE_ROW = "transformers' assisted generation takes one row at a time"


@dataclass(frozen=True)
class Method:
    """One way of decoding.

    Attributes:
        kind: one of `KINDS`.
        members: names of the assistants, the slowest first.
        layers: of an early exit; 0 for half of the target's.
        options: pairs of a short name (see `OPTIONS`) and a value.
    """

    kind: str
    members: tuple[str, ...] = ()
    layers: int = 0
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        text = self.kind
        if self.members:
            text += ":" + ",".join(self.members)
        elif self.kind == CHAIN:
            text += f":{NONE}"
        if self.layers:
            text += f":{self.layers}"
        if self.options:
            text += "@" + ",".join(f"{key}={value}" for key, value in self.options)
        return text

    def label(self, batch: int) -> str:
        """The name under which records of this batch size are kept; that of batch 1 is the plain name."""
        if batch == 1:
            return self.name
        return f"{self.name}{',' if self.options else '@'}batch={batch}"

    def hindrance(self, batch: int) -> str | None:
        """Why this method cannot run at a batch size, known without trying; None if it can."""
        return _ONE_ROW if batch > 1 and self.kind.startswith("hf:") else None

    @property
    def is_auto(self) -> bool:
        """Whether the levels are left to "auto"."""
        return self.members == (AUTO,)

    @property
    def chain_options(self) -> dict[str, Any]:
        """The options under their names in `generate()`."""
        found: dict[str, Any] = {}
        for key, value in self.options:
            found[OPTIONS[key]] = _READERS.get(key, _WHOLE)[0](value)
        return found


def parse(text: str, known: Sequence[str]) -> Method:
    """Read a method's name.

    Args:
        text: as a user writes it.
        known: names of the run's assistants.

    Raises:
        ValueError: it is no method, or names an assistant that is not there.
    """
    body, _, tail = text.partition("@")
    kind = next((k for k in sorted(KINDS, key=len, reverse=True) if body == k or body.startswith(k + ":")), None)
    if kind is None:
        raise ValueError(f"--methods names {text!r}; a method is one of {', '.join(KINDS)}, maybe with :assistants.")
    rest = body[len(kind) + 1 :]
    options = _parse_options(tail, text) if tail else ()
    if kind not in (CHAIN, PLANNED) and options:
        raise ValueError(f"--methods names {text!r}; only chains take options.")
    if kind in (PLAIN, PACKED, PROMPT_LOOKUP, PLANNED) and rest:
        raise ValueError(f"--methods names {text!r}; {kind} takes no assistants.")
    if kind == EARLY_EXIT:
        if rest and not rest.isdecimal():
            raise ValueError(f"--methods names {text!r}; after {EARLY_EXIT}: comes a number of layers.")
        return Method(kind, layers=int(rest or 0))
    members = tuple(part.strip() for part in rest.split(",") if part.strip())
    if kind == CHAIN and members == (AUTO,):
        return Method(kind, members, options=options)
    if kind == CHAIN and members == (NONE,):
        return Method(kind, options=options)
    if kind in (CHAIN, ASSISTED):
        if not members:
            raise ValueError(
                f"--methods names {text!r}; {kind} needs an assistant, as in {kind}:{(*known, 'int8')[0]}."
            )
        missing = [member for member in members if member not in known]
        if missing:
            raise ValueError(f"--methods names the assistant {missing[0]!r}, which no --assistant gives.")
        if kind == ASSISTED and len(members) > 1:
            raise ValueError(f"--methods names {text!r}; transformers takes one assistant.")
    return Method(kind, members, options=options)


def _parse_options(tail: str, text: str) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for part in tail.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in OPTIONS:
            raise ValueError(f"--methods names {text!r}; options of a chain are {', '.join(OPTIONS)}, as in block=12.")
        reader, words = _READERS.get(key, _WHOLE)
        try:
            reader(value)
        except ValueError:
            raise ValueError(f"--methods names {text!r}; {key} takes {words}.") from None
        found[key] = value
    method = Method(CHAIN, options=tuple(found.items()))
    PolySpecOptions(**method.chain_options)
    return method.options


def chains(members: Sequence[str], drafters: Sequence[str]) -> list[Method]:
    """Every chain that keeps the order of the assistants: each alone, then pairs, then threes.

    Args:
        members: names of the assistants, the slowest first.
        drafters: those of them that can only be last.
    """
    found = []
    for size in range(1, min(LONGEST_CHAIN, len(members)) + 1):
        for chosen in combinations(members, size):
            if not any(name in drafters for name in chosen[:-1]):
                found.append(Method(CHAIN, chosen))
    return found


def expand(words: Sequence[str] | None, members: Sequence[str], drafters: Sequence[str], plan: bool) -> list[Method]:
    """The list of methods from what the user wrote.

    Args:
        words: method names, or `peers`, `chains` for all of a kind; None for everything there is.
        members: names of the assistants, the slowest first.
        drafters: those of them that are no models for transformers to assist with, and can only be last in a chain.
        plan: whether a plan was given.

    Returns:
        Each method once, plain first: everything is compared with it.

    Raises:
        ValueError: as `parse`; or `planned` without a plan.
    """
    models = [name for name in members if name not in drafters]
    wanted: list[Method] = [Method(PLAIN)]
    for word in words or ["peers", "chains", *([PLANNED] if plan else [])]:
        if word == "peers":
            assisted = [Method(ASSISTED, (name,)) for name in models[:1]]
            wanted += [Method(PACKED), Method(PROMPT_LOOKUP), *assisted, Method(EARLY_EXIT)]
        elif word == "chains":
            wanted += chains(members, drafters)
        else:
            wanted.append(parse(word, members))
    if any(method.kind == PLANNED for method in wanted) and not plan:
        raise ValueError("The method planned needs a plan: --plan FILE, as polyspec plan writes it.")
    return list(dict.fromkeys(wanted))


def sweep(methods: Sequence[Method], values: Mapping[str, Sequence[str]], drafters: Sequence[str]) -> list[Method]:
    """Each chain once for every value of an option that acts on it; other methods as they are.

    Args:
        methods: to sweep.
        values: for each option (see `OPTIONS`), the values to try.
        drafters: names of assistants without a forward pass of their own to be asked of (a block needs a middle).

    Raises:
        ValueError: an option does not exist or a value is not one of its.
    """
    found = list(methods)
    for key, choices in values.items():
        for value in choices:
            _parse_options(f"{key}={value}", f"--sweep {key}={value}")
        swept: list[Method] = []
        for method in found:
            if method.kind != CHAIN or not _acts(key, method, drafters) or key in dict(method.options):
                swept.append(method)
                continue
            swept += [replace(method, options=(*method.options, (key, str(value)))) for value in choices]
        found = list(dict.fromkeys(swept))
    return found


def _acts(key: str, method: Method, drafters: Sequence[str]) -> bool:
    """Whether an option can make a difference to a chain."""
    if not method.members or method.is_auto:
        return False
    if key == "block":
        return len(method.members) > 1
    if key in ("tree", "depth", "topk"):
        return method.members[-1] in drafters and method.members[-1] != "suffix"
    return True
