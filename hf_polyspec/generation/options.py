# SPDX-License-Identifier: Apache-2.0
"""The options of a chain: read once, validated, frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from transformers import GenerationConfig

from ..defaults import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_DIRECT_TOKENS,
    DEFAULT_TREE_DEPTH,
    DEFAULT_TREE_TOP_K,
    require_choice,
    require_count,
    require_places,
    require_temperature,
)
from ..host.generation import host_defaults, keep_options

Verification = Literal["auto", "coupled", "token", "block"]
Schedule = Literal["constant", "heuristic", "heuristic_transient"]
Control = Literal["fixed", "online"]

BESIDE = ("assistant_models", "polyspec_plan")
"""What may stand in a generation config besides the options: which levels there are, and a plan of them."""


@dataclass(frozen=True)
class PolySpecOptions:
    """How the levels of a chain behave.

    The first three are transformers' own options for assistants. Given to `generate()` they hold for every drafter;
    set on an assistant's `generation_config` they hold for that one; left alone, the defaults below apply.

    Attributes:
        num_assistant_tokens: tokens a drafter proposes a round, 1 or more.
        assistant_confidence_threshold: 0 to 1; a drafter stops after a token it was less sure of.
        num_assistant_tokens_schedule: "constant", "heuristic" or "heuristic_transient".
        polyspec_block_size: tokens a middle model collects before the level above checks them, 1 or more.
        polyspec_direct_tokens: a draft of at least this many tokens by a drafter whose long drafts are sure ones (a
            suffix match) passes the middle above it by and is checked by the level above that; 0 for never.
        polyspec_verification: how sampled text is verified. "coupled": all levels read the noise that plain
            generate() would draw, and the text under a seed is plain generate()'s own, token for token. "token" and
            "block": speculative sampling with draws of each level's own; the same law, another text, and a little more
            is accepted. "auto": "coupled", or with a bias budget token and block verification, whichever accepts more.
            Greedy decoding is the same with all of them.
        polyspec_tree_tokens: most tokens of the tree an EAGLE head proposes, 0 for a chain.
        polyspec_tree_depth: most tokens of a path of that tree, 1 or more.
        polyspec_tree_top_k: how many continuations the head follows at each depth, 1 or more.
        polyspec_control: "fixed", or "online": sizes and the choice of levels follow what is measured during the
            generation. Exact either way, and the text under a seed is the same; except with "token" and "block", where
            which random number decides what depends on the clock.
        polyspec_bias_budget: 0 to 1, the share of the target's rejections that is waived; 0 is exact. A lossy dial for
            sampling (Yin et al. 2024, arXiv 2411.00841): a judged token is that share of TV(p, q) away from its law.
        polyspec_draft_vocabulary: ids an EAGLE head chooses from, besides those of the prompt and of late; as many as
            it knows, or more, for all. "auto" for a size that pays where it knows many; None for "auto" where the
            head's config says which ids are frequent, and for all elsewhere.
        polyspec_draft_temperature: above 0; a drafting model or head draws from its law to the power of one over
            this, normalised: below 1 likelier drafts. None for what a head's config says, and for 1 elsewhere.
        polyspec_draft_copies: whether an EAGLE head's guesses are mixed with what followed the same tokens earlier in
            the text, with what the level above foresaw of the prompt, and with what it said after guesses that it
            rejected.
        polyspec_placement: where levels run whose target several processes share: "one" (in process 0, which tells the
            others what they offer), "replicated" (in every process), "sharded" (split as the target is); or a list of
            one for each of `assistant_models`. "auto": what was measured to be quickest. Says nothing in one process.
        polyspec_seed: a whole number, and the text is the one after `torch.manual_seed` with it, the caller's generator
            untouched; or a list of one for each row (each of `num_return_sequences`), and each row is what plain
            generate() writes for it alone after its own. None: torch's default generator, as plain generate().
        polyspec_pack: whether float assistants on a CPU multiply in a faster layout while the chain runs
            (`hf_polyspec.pack`; the same within rounding, and a second copy of their matrices).
    """

    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float | None = None
    num_assistant_tokens_schedule: Schedule | None = None
    polyspec_block_size: int = DEFAULT_BLOCK_SIZE
    polyspec_direct_tokens: int = DEFAULT_DIRECT_TOKENS
    polyspec_verification: Verification = "auto"
    polyspec_tree_tokens: int = 0
    polyspec_tree_depth: int = DEFAULT_TREE_DEPTH
    polyspec_tree_top_k: int = DEFAULT_TREE_TOP_K
    polyspec_control: Control = "fixed"
    polyspec_bias_budget: float = 0.0
    polyspec_draft_vocabulary: int | Literal["auto"] | None = None
    polyspec_draft_temperature: float | None = None
    polyspec_draft_copies: bool = True
    polyspec_pack: bool = True
    polyspec_placement: str | Sequence[str] = "auto"
    polyspec_seed: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        require_count("num_assistant_tokens", self.num_assistant_tokens)
        require_count("polyspec_block_size", self.polyspec_block_size)
        require_count("polyspec_direct_tokens", self.polyspec_direct_tokens, least=0)
        require_count("polyspec_tree_tokens", self.polyspec_tree_tokens, least=0)
        require_count("polyspec_tree_depth", self.polyspec_tree_depth)
        require_count("polyspec_tree_top_k", self.polyspec_tree_top_k)
        if self.polyspec_draft_vocabulary != "auto":
            require_count("polyspec_draft_vocabulary", self.polyspec_draft_vocabulary, hint=' or "auto"')
        require_temperature("polyspec_draft_temperature", self.polyspec_draft_temperature)
        require_choice("polyspec_draft_copies", self.polyspec_draft_copies, (True, False))
        require_choice("polyspec_pack", self.polyspec_pack, (True, False))
        threshold = self.assistant_confidence_threshold
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise ValueError(f"assistant_confidence_threshold must be a number from 0 to 1, got {threshold!r}.")
        require_choice("num_assistant_tokens_schedule", self.num_assistant_tokens_schedule, (None, *get_args(Schedule)))
        require_choice("polyspec_verification", self.polyspec_verification, get_args(Verification))
        require_choice("polyspec_control", self.polyspec_control, get_args(Control))
        budget = self.polyspec_bias_budget
        if isinstance(budget, bool) or not (isinstance(budget, (int, float)) and 0 <= budget <= 1):
            raise ValueError(f"polyspec_bias_budget must be a number from 0 to 1, got {budget!r}.")
        if budget and self.polyspec_verification in ("block", "coupled"):
            raise ValueError(
                "polyspec_bias_budget is defined token by token; leave "
                f'polyspec_verification="{self.polyspec_verification}" out with it.'
            )
        self._check_seed()
        require_places(self.polyspec_placement)

    @property
    def couples(self) -> bool:
        """Whether sampled text is plain generate()'s own under a seed."""
        return self.polyspec_verification in ("auto", "coupled") and not self.polyspec_bias_budget

    def keeps_text(self, draws: bool) -> bool:
        """Whether a text stays what it is, whatever sizes it is written with; draws: whether its tokens are drawn."""
        return self.couples or not (draws or self.polyspec_bias_budget)

    def _check_seed(self) -> None:
        seed = self.polyspec_seed
        alone = seed is None or _is_seed(seed)
        if not alone and not (isinstance(seed, (list, tuple)) and seed and all(map(_is_seed, seed))):
            raise ValueError(
                "polyspec_seed must be a whole number as torch.manual_seed takes it, or a list of one for each row, "
                f"got {seed!r}."
            )
        if not alone and not self.couples:
            raise ValueError(
                "polyspec_seed as a list gives each row the text that plain generate() writes for it alone, which "
                'polyspec_verification="token" or "block" and a bias budget do not; pass one number.'
            )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All option names."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def read(cls, explicit: Mapping[str, Any], config: Any) -> PolySpecOptions:
        """Combine what was passed to `generate()` with what the generation config says.

        Args:
            explicit: options passed by name; None means not passed.
            config: the prepared GenerationConfig. transformers has by then filled its own defaults into the
                assistant options, so a value that equals such a default counts as not set.

        Raises:
            ValueError: an option is out of range; the sentence names it.
        """
        filled: dict[str, Any] = {}
        defaults = host_defaults(config)
        for name in cls.names():
            value = explicit.get(name)
            if value is None:
                value = getattr(config, name, None)
                if name in defaults and value == defaults[name]:
                    value = None
            if value is not None:
                filled[name] = value
        known = (*BESIDE, *cls.names())
        unknown = [name for name in vars(config) if name.startswith("polyspec_") and name not in known]
        if unknown:
            near = get_close_matches(unknown[0], known[1:], 1, 0)[0]
            raise ValueError(f"unknown option {unknown[0]!r}; did you mean {near}? docs/options.md lists all.")
        return cls(**filled)

    def for_assistant(self, assistant: Any) -> PolySpecOptions:
        """These options, with gaps filled from an assistant's own generation config."""
        config = getattr(assistant, "generation_config", None)
        own = {
            name: getattr(config, name, None)
            for name in (
                "num_assistant_tokens",
                "assistant_confidence_threshold",
                "num_assistant_tokens_schedule",
            )
        }
        values = {name: getattr(self, name) for name in self.names()}
        for name, value in own.items():
            if values[name] is None:
                values[name] = value
        return PolySpecOptions(**values)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 64


keep_options(name for name in (*PolySpecOptions.names(), *BESIDE) if not hasattr(GenerationConfig(), name))
