# SPDX-License-Identifier: Apache-2.0
"""A processor's state for the level below, got as cheaply as the object allows.

A function of the ids (`prefix_allowed_tokens_fn`) is asked itself. A matcher that makes copies of itself (xgrammar's
`fork`, llguidance's `deep_copy`) makes one; one that can only be rolled back is walked ahead by the level below and
rolled back before anybody else looks at it. What is compiled from a grammar never changes and is shared. Everything
else is copied, if it lets itself be.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor

_COPIES = ("fork", "deep_copy")
_TAKES_ONE = ("accept_token", "consume_token", "advance")
_TAKES_MANY = ("consume_tokens",)
_COMPILED = {
    "xgrammar": {"CompiledGrammar", "GrammarCompiler", "TokenizerInfo"},
    "llguidance": {"LLTokenizer"},
    "outlines_core": {"Index", "Vocabulary"},
}
"""By package, classes whose objects are made once and only read."""
_DEPTH = 6
_SIMPLE = (str, bytes, int, float, type(None), torch.Tensor, type, ModuleType, FunctionType)


class AllowedTokens(LogitsProcessor):
    """A `prefix_allowed_tokens_fn` for rows that run apart: asked about single rows, each under its own place.

    Args:
        processor: transformers' own, which holds the function.
    """

    def __init__(self, processor: LogitsProcessor) -> None:
        self.allowed = next(value for value in vars(processor).values() if callable(value))

    def of_rows(self, ids: torch.Tensor, scores: torch.Tensor, rows: Collection[int]) -> torch.Tensor:
        """Scores `[B, V]` after ids `[B, L]`, of these rows only."""
        scores = scores.clone()
        for row in rows:
            mask = torch.full_like(scores[row], float("-inf"))
            mask[torch.as_tensor(list(self.allowed(row, ids[row])), dtype=torch.long, device=mask.device)] = 0
            scores[row] += mask
        return scores

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Of all rows."""
        return self.of_rows(input_ids, scores, range(len(input_ids)))


class Lent:
    """A matcher that a level below walks ahead with; it goes back to where it was when it is given back.

    Args:
        matcher: has `rollback(tokens)` and takes tokens one by one, or several.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._ahead = 0
        self._further: list[Lent] = []
        if isinstance(matcher, Lent):
            matcher._further.append(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._matcher, name)
        if name not in (*_TAKES_ONE, *_TAKES_MANY, "rollback"):
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            taken = found(*args, **kwargs)
            if name == "rollback":
                self._ahead -= args[0] if args else next(iter(kwargs.values()), 1)
            elif taken is not False:
                self._ahead += len(args[0]) if name in _TAKES_MANY else 1
            return taken

        return counted

    def give_back(self) -> None:
        """Roll back whatever was taken since it was lent."""
        for lent in self._further:
            lent.give_back()
        self._further.clear()
        ahead, self._ahead = self._ahead, 0
        if ahead:
            self._matcher.rollback(ahead)


def duplicate(processor: LogitsProcessor) -> tuple[LogitsProcessor | None, list[Lent], str]:
    """The processor as it stands, for somebody who goes on with it alone.

    Returns:
        It, None if that cannot be; matchers that are only lent; and why it cannot be, in a few words.
    """
    memo: dict[int, Any] = {}
    lent: list[Lent] = []
    for value in _inside(processor):
        if isinstance(value, nn.Module):
            return None, [], "it runs a model of its own"
        if _is_shared(value):
            memo[id(value)] = value
            continue
        if not _takes_tokens(value):
            continue
        own = next((name for name in _COPIES if callable(getattr(value, name, None))), None)
        if isinstance(value, Lent) or (own is None and _goes_back(value) and not _copies(value)):
            memo[id(value)] = Lent(value)
            lent.append(memo[id(value)])
        elif own is not None:
            memo[id(value)] = getattr(value, own)()
    try:
        # What stands in the memo is taken from there; deepcopy would otherwise be asked to copy the stand-ins.
        return copy.deepcopy(processor, memo), lent, ""
    except Exception as error:
        return None, [], f"it cannot be copied ({type(error).__name__})"


def _inside(value: Any, depth: int = _DEPTH, seen: set[int] | None = None) -> Iterator[Any]:
    """Objects that a processor holds: its attributes, theirs, and what lies in lists and dicts of them."""
    seen = set() if seen is None else seen
    if isinstance(value, dict):
        parts: Any = value.values()
    elif isinstance(value, (list, tuple, set)):
        parts = value
    else:
        parts = getattr(value, "__dict__", {}).values()
    for part in list(parts)[:64]:
        if id(part) in seen or isinstance(part, _SIMPLE):
            continue
        seen.add(id(part))
        container = isinstance(part, (dict, list, tuple, set))
        if not container:
            yield part
        whole = isinstance(part, (nn.Module, Lent)) or _is_shared(part) or _takes_tokens(part)
        if depth > 0 and (container or not whole):
            yield from _inside(part, depth - 1, seen)


def _is_shared(value: Any) -> bool:
    """Tokenizers, and what was compiled from a grammar."""
    kind = type(value)
    package = kind.__module__.split(".")[0]
    return hasattr(value, "convert_ids_to_tokens") or kind.__name__ in _COMPILED.get(package, ())


def _takes_tokens(value: Any) -> bool:
    return any(callable(getattr(value, name, None)) for name in (*_TAKES_ONE, *_TAKES_MANY))


def _goes_back(value: Any) -> bool:
    return callable(getattr(value, "rollback", None))


def _copies(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True
