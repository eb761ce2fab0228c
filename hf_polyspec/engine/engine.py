# SPDX-License-Identifier: Apache-2.0
"""`Engine`: one chain that many callers share, whose prompts join while others run."""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from ..defaults import require_count, require_model
from ..errors import refusals
from ..generation.options import PolySpecOptions
from ..generation.setting import Setting
from ..host.encoded import is_encoder_decoder
from ..host.ranks import ALONE, ranks_of
from ..host.release import inner_model, input_device
from .crew import Crew
from .desk import Desk
from .held import Held
from .prepared import prepare
from .request import Handle, Listener, Request
from .steering import Steering

DEFAULT_SLOTS = 8
DEFAULT_QUEUE = 1024
_PATIENCE = 10.0
"""Seconds that a program which ends waits for the round that runs."""


class Engine:
    """Generates for many callers at once with one model and one chain.

    ::

        with hf_polyspec.Engine(model, assistant_models=["int8", "suffix"], tokenizer=tokenizer) as engine:
            handles = [engine.submit(prompt, max_new_tokens=64) for prompt in prompts]
            for handle in handles:
                print(tokenizer.decode(handle.result()[0]))

    Up to `slots` texts are written at a time; others wait in the order in which they came, and take the place of one
    that has ended. Every text is what `model.generate()` writes for its prompt alone, under its own options and its own
    seed: who else runs, and when it began, changes nothing of it.

    One thread runs the chain; `submit`, `cancel` and everything a handle offers may be called from any thread and from
    asyncio (`await handle`, `async for token in handle`). Streamers, processors and criteria are called in the engine's
    thread: a slow one slows everybody.

    A request's own processor, criterion or streamer that raises ends that request alone. Where a level fails, all that
    have a place end with its error, which names it, and the next requests begin with a chain that holds nothing.

    Args:
        model: the target.
        assistant_models: as for `generate()`; an empty list decodes without drafts, "auto" takes what pays here.
        slots: texts that are written at a time, 1 or more.
        queue: requests that may wait, 1 or more.
        max_total_tokens: most tokens, prompts and new ones, that all texts with a place may come to hold together, so
            that memory is known beforehand; None for any number. Requests wait until they fit.
        tokenizer: for prompts that are text, and for stop strings.
        options: those of `PolySpecOptions` that concern the chain, such as `num_assistant_tokens=4`.

    Raises:
        TypeError, ValueError: what cannot be served, in one sentence.
    """

    def __init__(
        self,
        model: Any,
        assistant_models: Any = (),
        *,
        slots: int = DEFAULT_SLOTS,
        queue: int = DEFAULT_QUEUE,
        max_total_tokens: int | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        require_model("Engine", model)
        for name, value in (("slots", slots), ("queue", queue)):
            require_count(name, value)
            if value is None:
                raise ValueError(f"{name} must be a whole number of at least 1, got None.")
        require_count("max_total_tokens", max_total_tokens)
        self.model = inner_model(model)
        self.tokenizer = tokenizer
        self.slots = slots
        self.max_total_tokens = max_total_tokens
        _check_options(options)
        self._serial = itertools.count()
        self._desk = Desk(queue)
        if is_encoder_decoder(self.model):
            raise ValueError("the target has an encoder, which an Engine does not serve; use generate().")
        if ranks_of(self.model) is not ALONE:
            raise ValueError(
                "the target's weights are shared by processes, in which an Engine does not keep its rows in step; use "
                "generate()."
            )
        held = Held(self.model, assistant_models, options)
        self.options = held.options
        device = input_device(self.model)
        ends = self.model.generation_config.eos_token_id
        eos = frozenset() if ends is None else frozenset(ends if isinstance(ends, (list, tuple)) else [int(ends)])
        setting = Setting(held.options, device, eos, 0, slots, joins=True)
        steering = Steering(held.options, device, held.costs, fixed=options.get("polyspec_control") == "fixed")
        try:
            with refusals():
                self._crew = Crew(held, setting, steering, self._desk, max_total_tokens)
        except BaseException:
            held.close()
            raise
        self._thread = threading.Thread(target=self._crew.run, name="hf_polyspec engine", daemon=True)
        self._ended = weakref.finalize(self, _end, self._desk, self._thread)
        self._thread.start()

    def submit(
        self,
        prompt: Any,
        generation_config: GenerationConfig | None = None,
        *,
        streamer: Any = None,
        seed: int | None = None,
        timeout: float | None = None,
        tokenizer: Any = None,
        listener: Listener | None = None,
        **kwargs: Any,
    ) -> Handle:
        """Ask for a text.

        Args:
            prompt: text, if the engine has a tokenizer; or token ids: a list, a tensor `[L]` or `[1, L]`, or what a
                tokenizer returns for one text.
            generation_config: as for `generate()`.
            streamer: gets the prompt and then every token, in the engine's thread.
            seed: a whole number, and a sampled text is the one that `generate()` writes after `torch.manual_seed` with
                it (`polyspec_seed` is another name for it). None: one is drawn now, from torch's default generator.
            timeout: seconds to wait where the queue is full; None for as long as it takes, 0 for not at all.
            tokenizer: the engine's by default.
            listener: is told when it begins, and then of the new tokens of a round at once, in the engine's thread.
            kwargs: options of `generate()`: max_new_tokens, do_sample, temperature, logits_processor,
                stopping_criteria, stop_strings, return_dict_in_generate ... `max_time` counts from now.

        Returns:
            The text to come.

        Raises:
            TypeError, ValueError: what cannot be served, in one sentence and before it waits.
            QueueFullError: the queue is full; EngineClosedError: the engine is closed.
        """
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout < 0):
            raise ValueError(f"timeout must be a number of seconds, 0 or more, or None, got {timeout!r}.")
        named = kwargs.pop("polyspec_seed", None)
        if seed is not None and named is not None:
            raise ValueError("seed and polyspec_seed are one thing; give one of them.")
        seed = named if seed is None else seed
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ValueError(f"seed must be a whole number as torch.manual_seed takes it, got {seed!r}.")
        replace(self.options, polyspec_seed=seed)
        self._desk.check_open()
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        prepared = prepare(self.model, prompt, generation_config, seed, self.options, tokenizer, kwargs)
        if self.max_total_tokens is not None and prepared.tokens > self.max_total_tokens:
            raise ValueError(
                f"the request may come to hold {prepared.tokens} tokens, and all together may hold "
                f"max_total_tokens={self.max_total_tokens}; ask for fewer new tokens."
            )
        handle = Handle(prepared.ids, prepared.seed, self)
        crew, place = self._crew, next(self._serial)

        def make() -> Request:
            device, vocabulary, noise = crew.setting.device, crew.vocabulary, crew.noise
            return Request(place, prepared, handle, streamer, device, vocabulary, noise, listener)

        request = self._desk.put(make, timeout)
        desk = self._desk
        handle.add_done_callback(lambda _: desk.discard(request))
        return handle

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, let those that are there come to their end, and release everything.

        Args:
            cancel: give up what waits and runs instead.
        """
        self._desk.close("the engine is closed; make a new one.", cancel=cancel)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def closed(self) -> bool:
        """Whether requests are refused."""
        return self._desk.closed is not None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(cancel=kind is not None)


def _end(desk: Desk, thread: threading.Thread) -> None:
    """Nobody holds the engine any more, or the program ends."""
    desk.close("the engine is closed; make a new one.", cancel=True)
    if threading.current_thread() is not thread:
        thread.join(_PATIENCE)


def _check_options(given: dict[str, Any]) -> None:
    """Refuse what is no option of a chain.

    Raises:
        TypeError: no option; ValueError: one of a single request.
    """
    names = PolySpecOptions.names()
    unknown = next((name for name in given if name not in names), None)
    if unknown is not None:
        raise TypeError(f"Engine() got {unknown!r}, which is no option of a chain; options of a text go to submit().")
    if given.get("polyspec_seed") is not None:
        raise ValueError("polyspec_seed belongs to one text: give it to submit().")
