# SPDX-License-Identifier: Apache-2.0
"""The models of a run, and how each method makes them answer."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..cpu.packing import is_packed, pack
from ..eagle.modeling import EagleHead
from ..generation.chain import check_assistants
from ..generation.doors import generate
from ..host.waiting import wait_for
from ..levels.base import Drafter
from ..models.assistants import end_ids, load_assistant
from ..models.by_name import load_model, load_tokenizer
from ..quantization.modules import sharing_copy
from .conversation import cut_at_end, pad_left, stop_ids
from .memory import PeakMeter, weight_bytes
from .methods import ASSISTED, CHAIN, EARLY_EXIT, PACKED, PLANNED, PROMPT_LOOKUP, Method

if TYPE_CHECKING:
    from ..generation.plan import Plan

LOOKUP_TOKENS = 10
"""What transformers' documentation uses for prompt_lookup_num_tokens."""


@dataclass(frozen=True)
class Ask:
    """How to generate, the same for every method.

    Attributes:
        max_new_tokens: most tokens of an answer.
        temperature: 0 for greedy; above it, the whole distribution is sampled (no top-k, no top-p).
        seed: of the sampling.
    """

    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one call of generate() made of a batch.

    Attributes:
        rows: generated ids of each row, up to and including its end.
        seconds: wall time of the call, the prompt's pass included.
        peak_bytes, rise_bytes: as `PeakMeter` gives them.
        target_passes: forward passes of the target, where they were counted.
        levels: telemetry of each level of a chain, the target first.
        token_levels: for each row, which level first proposed each of its tokens.
    """

    rows: list[list[int]]
    seconds: float
    peak_bytes: int
    rise_bytes: int
    target_passes: int | None = None
    levels: list[dict[str, Any]] = field(default_factory=list)
    token_levels: list[list[int]] | None = None


@dataclass
class Cast:
    """The models of a run.

    Attributes:
        target: as a user has it.
        tokenizer: the target's.
        assistants: by name, the slowest first.
        packed: the target our chains run on: the same weights, packed where that helps.
        plan: what the planner chose, or None; other_dtype: whether it was made for another dtype than this one's.
        ends: ids that end an answer.
        template: a chat template instead of the tokenizer's own; system: a system message, or None.
    """

    target: Any
    tokenizer: Any
    assistants: dict[str, Any]
    packed: Any
    plan: Any = None
    other_dtype: bool = False
    ends: tuple[int, ...] = ()
    template: str | None = None
    system: str | None = None

    @property
    def drafters(self) -> list[str]:
        """Names of the assistants that are no models, and can only be last in a chain."""
        return [name for name, one in self.assistants.items() if isinstance(one, Drafter | EagleHead)]

    @property
    def pad(self) -> int:
        """The id for places without a token."""
        own = getattr(self.tokenizer, "pad_token_id", None)
        return int(own) if own is not None else (self.ends or (0,))[0]

    def members(self, method: Method) -> list[Any]:
        """The assistants a method uses."""
        if method.kind == PLANNED:
            return list(self.assistants.values())
        return list(method.members) if method.is_auto else [self.assistants[name] for name in method.members]

    def weights(self, method: Method) -> int:
        """Bytes of the weights a method needs, target included."""
        return weight_bytes([self.target, *self.members(method)])

    def check(self, method: Method) -> None:
        """Refuse a chain that cannot be, before anything is computed.

        Raises:
            ValueError, TypeError: as `generate(assistant_models=...)`.
        """
        if method.kind == CHAIN and not method.is_auto:
            check_assistants(self.packed, self.members(method))

    def answer(self, method: Method, prompts: Sequence[Sequence[int]], ask: Ask) -> Outcome:
        """Answer a batch of prompts with one method.

        Args:
            method: how.
            prompts: ids of each row.
            ask: what is asked for.

        Raises:
            ValueError: the method cannot serve it; whatever a model raises.
        """
        on_packed = method.kind in (PACKED, CHAIN, PLANNED) and not method.is_auto
        model = self.packed if on_packed else self.target
        inputs = pad_left(prompts, self.pad, model.device)
        arguments = {**inputs, "generation_config": self._config(model, ask)}
        meter = PeakMeter(model.device)
        torch.manual_seed(ask.seed)
        with _as_found(self.target, method, self.members(method)) as passes:
            call = self._call(model, method, arguments)
            wait_for(model.device)
            meter.start()
            started = time.perf_counter()
            output = call()
            wait_for(model.device)
            seconds = time.perf_counter() - started
            peak, rise = meter.stop()
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        rows = [cut_at_end(row, self.ends) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        stats = getattr(output, "polyspec", None)
        if stats is None:
            return Outcome(rows, seconds, peak, rise, passes[0] if method.kind.startswith("hf:") else None)
        levels = [level.to_dict() for level in stats.levels]
        by_row = [list(row[: len(ids)]) for row, ids in zip(stats.token_levels, rows, strict=True)]
        return Outcome(rows, seconds, peak, rise, levels[0]["forward_passes"], levels, by_row)

    def _call(self, model: Any, method: Method, arguments: dict[str, Any]) -> Any:
        """The call to be timed."""
        if method.kind in (CHAIN, PLANNED):
            arguments["generation_config"].return_dict_in_generate = True
            extra: dict[str, Any] = {"assistant_models": self.members(method), **method.chain_options}
            if method.kind == PLANNED:
                extra |= self._planned()
            return lambda: generate(model, **arguments, **extra)
        if method.kind == PROMPT_LOOKUP:
            arguments["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        elif method.kind == ASSISTED:
            arguments["assistant_model"] = self.members(method)[0]
        elif method.kind == EARLY_EXIT:
            layers = int(self.target.config.get_text_config(decoder=True).num_hidden_layers)
            arguments["assistant_early_exit"] = method.layers or max(1, layers // 2)
        return lambda: model.generate(**arguments)

    def _planned(self) -> dict[str, Any]:
        """The plan as `generate()` takes it; in another dtype than it was made for, what it chose."""
        if not self.other_dtype:
            return {"polyspec_plan": self.plan}
        assistants = list(self.assistants.values())
        chosen = [assistants[place] for place in self.plan.chosen]
        return {"assistant_models": chosen, **self.plan.options} if chosen else {"assistant_models": None}

    def _config(self, model: Any, ask: Ask) -> Any:
        config = copy.deepcopy(model.generation_config)
        config.max_length = None
        config.max_new_tokens = ask.max_new_tokens
        config.do_sample = ask.temperature > 0
        config.eos_token_id = list(self.ends) or None
        config.pad_token_id = self.pad
        config.temperature = config.top_p = config.top_k = config.min_p = None
        if config.do_sample:
            config.temperature, config.top_k, config.top_p = ask.temperature, 0, 1.0
        return config


@contextmanager
def _as_found(target: Any, method: Method, members: Sequence[Any]) -> Iterator[list[int]]:
    """Leave models as they were found, and count the target's passes while transformers assists.

    transformers writes what it learns about an assistant into its generation config, which the next method would read,
    and early exit changes the target's number of layers while it drafts.
    """
    if not method.kind.startswith("hf:"):
        yield [0]
        return
    passes = [0]
    text = target.config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    models = [target, *(one for one in members if hasattr(one, "generation_config"))]
    configs = [copy.deepcopy(one.generation_config) for one in models]

    def count(*_: Any) -> None:
        passes[0] += text.num_hidden_layers == layers

    hook = target.register_forward_pre_hook(count)
    try:
        yield passes
    finally:
        hook.remove()
        text.num_hidden_layers = layers
        for one, config in zip(models, configs, strict=True):
            one.generation_config = config


@dataclass(frozen=True)
class CastRequest:
    """Which models a run needs.

    Attributes:
        model: the target's name.
        assistants: name and what to load (as `load_assistant` takes it), the slowest first.
        dtype, device: of all of them.
        pack: whether our chains run on a packed target.
        plan: file of a plan, or None.
        template, system, stop: chat template, system message and names of end tokens instead of the model's own.
    """

    model: str
    assistants: tuple[tuple[str, str], ...] = ()
    dtype: str = "float32"
    device: str = "cpu"
    pack: bool = True
    plan: str | None = None
    template: str | None = None
    system: str | None = None
    stop: tuple[str, ...] | None = None


def load_cast(request: CastRequest, dtype: str | None = None) -> Cast:
    """Load the models of a run.

    Args:
        request: which.
        dtype: instead of the request's.

    Raises:
        ValueError: something cannot be loaded, or is no assistant for this target.
    """
    wanted = dtype or request.dtype
    target, tokenizer = load_model(request.model, wanted, request.device), load_tokenizer(request.model)
    assistants = {name: load_assistant(word, target, wanted, request.device) for name, word in request.assistants}
    ends = stop_ids(tokenizer, target, request.stop) or end_ids(target)
    for one in assistants.values():
        check_assistants(target, [one])
    plan = None if request.plan is None else load_plan(request.plan)
    packed = _packed(target) if request.pack else target
    other = dtype is not None
    return Cast(target, tokenizer, assistants, packed, plan, other, tuple(ends), request.template, request.system)


def load_plan(path: str) -> Plan:
    """A plan that `polyspec plan` wrote.

    Raises:
        ValueError: there is none in the file.
    """
    from ..generation.plan import Plan

    return Plan.load(Path(path).expanduser())


def _packed(target: Any) -> Any:
    """The same weights in a model of its own, packed; the target itself where packing does nothing."""
    other = pack(sharing_copy(target))
    return other if is_packed(other) else target
