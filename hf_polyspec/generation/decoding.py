# SPDX-License-Identifier: Apache-2.0
"""`decode`: what generate() calls instead of its own sampling loop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ..control import Costs, LedControl, OnlineControl, Shares, SteadyControl, online_control, shares_of
from ..errors import TARGET, UncheckableError
from ..exactness.callers_generator import BESIDE
from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.randomness import Deciding, decided_here
from ..host.callers_cache import check_cache, read_cache, tokens_held
from ..host.encoded import decoder_part, take_encoded
from ..host.forwarding import Extras
from ..host.generation import Output, is_callers, made_output, pad_id
from ..host.manners import runner_for
from ..host.maps import check_maps
from ..host.modeling import Cache
from ..host.moments import no_moment
from ..host.offloaded import rests_elsewhere
from ..host.own_cache import makes_own_cache
from ..host.own_rows import plainly_padded
from ..host.pictures import Sights, check_columns
from ..host.plain_cache import PlainCache
from ..host.ranks import Ranks
from ..host.release import GENERATION_CACHE, cache_names, cache_of
from ..host.rope import gate
from ..host.vocabularies import Vocabularies
from ..host.walking import Once
from ..levels.base import Drafter
from ..levels.verifier import Verifier
from ..telemetry.stats import PolySpecStats
from .alone import or_alone
from .chain import build_chain, levels_of
from .chances import Chances, check_seeds
from .checked import checked
from .course import Course, Stopping
from .handing_back import hand_back
from .kernels import note_kernels, packed
from .loop import DecodingLoop
from .meeting import Meeting, check_spread, facts_of, share, shared_levels
from .members import lent
from .options import PolySpecOptions
from .outputs import Recorder, Wanted
from .placements import Placed
from .prompts import context_of
from .setting import Setting
from .settling import placement, settled

UNLIMITED = 1 << 62
"""Ids of a text whose length nobody limits."""
UNDERSTOOD = {
    "attention_mask",
    "inputs_embeds",
    "inputs_shown",  # by a door: pictures as the caller passed them
    "labels",  # of a batch that a trainer hands over whole; plain generation drops them
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "return_dict",
    "use_cache",
}


@or_alone
@torch.no_grad()
def decode(
    model: Any,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    assistant_models: Sequence[Any] | None = None,
    num_assistant_tokens: int | None = None,
    assistant_confidence_threshold: float | None = None,
    num_assistant_tokens_schedule: str | None = None,
    polyspec_block_size: int | None = None,
    polyspec_direct_tokens: int | None = None,
    polyspec_verification: str | None = None,
    polyspec_tree_tokens: int | None = None,
    polyspec_tree_depth: int | None = None,
    polyspec_tree_top_k: int | None = None,
    polyspec_plan: Any = None,
    polyspec_control: str | None = None,
    polyspec_bias_budget: float | None = None,
    polyspec_draft_vocabulary: int | str | None = None,
    polyspec_draft_temperature: float | None = None,
    polyspec_draft_copies: bool | None = None,
    polyspec_pack: bool | None = None,
    polyspec_placement: str | Sequence[str] | None = None,
    polyspec_seed: int | Sequence[int] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    assistant_tokenizer: Any = None,
    synced_gpus: bool = False,
    inputs_tensor: torch.Tensor | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | Output:
    """Polybasic speculative decoding with transformers' `custom_generate` contract.

    Usable as it is: `model.generate(..., custom_generate=hf_polyspec.decode, assistant_models=[...])`. transformers
    drops a `streamer` on that path; `hf_polyspec.enable()` does not. Other arguments are those of `PolySpecOptions`.

    Args:
        model: the target.
        input_ids: `[B, L]` prompt ids, left-padded, already repeated for `num_return_sequences`.
        logits_processor: as generate() prepared them.
        stopping_criteria: likewise.
        generation_config: likewise.
        assistant_models: the levels below the target, the slowest first: models, drafters, or names such as "int8".
            An empty list runs the target alone, a token a pass; "auto" takes what pays here (docs/auto.md).
        polyspec_plan: a `Plan`, its dict or its path; which of `assistant_models` to use, and sizes not passed here.
        streamer: gets the new tokens of every step, `[B]`.
        tokenizer: the target's, needed beside `assistant_tokenizer`.
        assistant_tokenizer: of an assistant with another vocabulary than the target's, or a list with one for each
            member of the chain, None for those with the target's.
        synced_gpus: True is for a target under FSDP2 only, whose processes run as many passes in any case.
        inputs_tensor: what an encoder-decoder target's encoder has read.
        model_kwargs: mask, positions, cache and other forward arguments prepared by generate().

    Returns:
        `[B, L + T]` ids, or the output object of plain generation with `polyspec` (a `PolySpecStats`) added to it.

    Raises:
        ValueError, TypeError: what cannot be served, before the first forward pass.
            Also a target with which drafts cannot be checked, where plain generation cannot take over, see `alone`.
        LevelError: a model's forward pass failed; the caller's objects are as they were.
    """
    given = locals()  # before anything else is named: the arguments
    named = {name: given[name] for name in PolySpecOptions.names()}
    started = time.perf_counter()
    model_kwargs["inputs_tensor"] = inputs_tensor  # for the encoder, where there is one
    with no_moment(), Once(model) as once, Meeting(model, synced_gpus) as meeting:
        words, ranks, batch = (tokenizer, assistant_tokenizer), meeting.ranks, len(input_ids)
        found = checked(model, generation_config, assistant_models, polyspec_plan, named, words, ranks, batch)
        options = found.options
        job = _Job(model, input_ids, logits_processor, stopping_criteria, generation_config, options, model_kwargs)
        members = settled(job, found, meeting, words)
        check_spread(job.model, job.extras, ranks)
        job.steered = polyspec_control is None and getattr(generation_config, "polyspec_control", None) is None
        with lent(members) as own:
            chain = job.chain(own)
            once.end()
            job.decided = share(chain, own, ranks, job.placed.everywhere)
            job.shared = shared_levels(chain, own)
            meeting.begin(lambda: facts_of(input_ids, job.context.prompt.mask, generation_config, options, own))
            try:
                with packed(own if options.polyspec_pack else [], job.model):
                    rows, origins = job.run(chain, streamer, meeting)
                    note_kernels(chain)
                job.tell_lost(chain)
                job.tell_left_out(chain)
                return job.output(chain, rows, origins, time.perf_counter() - started, ranks)
            finally:
                if job.control is not None:
                    job.control.finish()
                chain.end()


class _Job:
    """One call of `decode`: what generate() prepared, in this package's terms."""

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        options: PolySpecOptions,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.model = model
        self.config = config
        self.options = options
        self.device = input_ids.device
        self.encoded, model_kwargs = take_encoded(model, model_kwargs)
        understood = UNDERSTOOD | cache_names(model_kwargs)
        self.extras = Extras.of(
            {name: value for name, value in model_kwargs.items() if name not in understood},
            model_kwargs.get("position_ids"),
        )
        check_columns(model, self.extras.first, input_ids)
        if model_kwargs.get("inputs_shown"):
            sights = Sights(model_kwargs["inputs_shown"], input_ids, config.num_return_sequences or 1)
            self.extras = replace(self.extras, sights=sights)
        if config.prefill_chunk_size and self.extras.marks_prompt:
            raise UncheckableError(
                "prefill_chunk_size cuts a prompt with images or other inputs into pieces, which assistant_models do "
                "not serve; leave it out.",
                TARGET,
            )
        self.whole_cache: Any = cache_of(model_kwargs)  # with an encoder's keys and values, where there is one
        self.user_cache: Cache | None = decoder_part(self.whole_cache)
        check_cache(self.user_cache, model, input_ids.shape[0])
        self.use_cache = bool(model_kwargs.get("use_cache", True))
        given = {**model_kwargs, GENERATION_CACHE: self.user_cache}
        self.context = context_of(input_ids, config, given, encodes=self.encoded is not None)
        check_seeds(options, self.context.batch)
        self.visible = input_ids.shape[1]
        self.stopping = Stopping.sort(criteria, config.max_length or UNLIMITED)
        self.law = LawMaker(processors, bool(config.do_sample), self.device, ends=self.stopping.eos)
        self.pad = pad_id(config)
        self.wanted = Wanted.of(config)
        if self.wanted.attentions and self.encoded is None:
            check_maps(model)
        self.cached = 0
        self.control: OnlineControl | LedControl | SteadyControl | Shares | None = None
        self.steered = False
        self.shared: Sequence[Drafter] = ()
        self.costs: Costs | None = None
        self.chosen: str | None = None
        self.chances: Chances | None = None
        self.decided: Deciding = decided_here
        self.bias: list[float] = []
        self.vocabularies: Sequence[Vocabularies | None] = ()
        self.placed = Placed()

    def chain(self, assistants: list[Any]) -> Verifier:
        """The levels, ready to run; the target starts from the caller's cache if there is something in it."""
        embeds = self.context.prompt.embeds
        told = {"output_hidden_states": self.wanted.hidden_states, "output_attentions": self.wanted.attentions}
        record = {name: True for name, wanted in told.items() if wanted}
        longest = self.config.max_length or UNLIMITED
        runner = runner_for(
            self.model,
            "the target",
            self.device,
            use_cache=self.use_cache,
            record=record,
            reads_embeds=True,
            extras=self.extras,
            kept=1,
            rows=self.context.batch if self._rows_are_own(record) else 0,
            columns=longest,
            encoded=self.encoded,
        )
        if self.use_cache and self._cache_is_special():
            copy, self.cached = read_cache(self.user_cache, self.model)
            if embeds is None:
                copy.floor = max(copy.floor, self.context.prompt.hidden)  # tokens without ids cannot be read again
            runner.adopt(copy, [ids[: self.cached] for ids in self.context.ids])
        setting = Setting(
            self.options,
            self.device,
            self.stopping.eos,
            self.pad,
            self.context.batch,
            0 if embeds is None else embeds.shape[2],
            self.extras,
            self.encoded,
            self.vocabularies,
            own_rows=self._rows_are_own(record),
            longest=longest,
            prompt=self.context.prompt,
        )
        return build_chain(self.model, assistants, setting, runner)

    def run(self, chain: Verifier, streamer: Any, meeting: Meeting) -> tuple[list[list[int]], list[list[int]]]:
        pieces = self._pieces()
        shown = PlainCache(self.user_cache, self.model, pieces, self.wanted.attentions) if self.use_cache else None
        self.recorder = Recorder(self.wanted, self.context.batch, pieces[-1], shown, chain.runner)
        if self.config.prefill_chunk_size:
            chain.prefill(self.context, self.config.prefill_chunk_size)
        if self.law.do_sample:
            meeting.take_generator(self.device)
            self.chances = Chances(self.options, self.device, self.context.batch, chain.vocabulary)
            drawn = self.chances.randomness, self.chances.noise
            self.law = LawMaker(self.law.processors, True, self.device, *drawn, self.stopping.eos, self.decided)
        if self.costs is not None and meeting.ranks.leads and len(levels_of(chain)) > 1:
            self.control = SteadyControl(chain, self.costs, shares=self.context.batch > 1)
        elif self.options.polyspec_control == "online" and len(levels_of(chain)) > 1:
            mode = self.law.do_sample, self.config.temperature, self.options.couples
            self.control = online_control(chain, self.shared, meeting.ranks, mode)
        elif self.steered and self.options.keeps_text(self.law.do_sample) and not meeting.ranks.in_step:
            self.control = shares_of(chain, self.context.batch, self.device)
        course = Course(
            [self.context.visible(b) for b in range(self.context.batch)],
            self.law,
            self.stopping,
            pad=self.pad,
            device=self.device,
            recorder=self.recorder,
            streamer=streamer,
            noise=None if self.chances is None else self.chances.noise,
            ranks=meeting.ranks,
        )
        loop = DecodingLoop(
            chain,
            self.law,
            may_drop_rows=not (
                self.wanted.any
                or self._cache_is_kept()
                or self.law.bound_to_rows
                or self.law.in_order
                or (self.extras.first and not self.use_cache)
            ),
            control=self.control,
            gate=gate(self.model, self._padding()),
        )
        try:
            loop.run(course, self.context)
        finally:
            if self.chances is not None:
                self.chances.finish()
        if self.law.draws:
            meeting.take_generator(self.device)  # process 0 alone has drawn
        self.bias = [row.bias for row in course.rows]
        return [row.committed for row in course.rows], [row.origins for row in course.rows]

    def tell_lost(self, chain: Verifier) -> None:
        """Say, where the text is not what a seed promises, that it is not: in the statistics, or in a warning."""
        lost = None if self.chances is None else self.chances.lost
        if lost is None:
            return
        chain.stats.notes.append(lost)
        if not self.config.return_dict_in_generate and lost is not BESIDE:
            warnings.warn(f"{lost[0].upper()}{lost[1:]}.", stacklevel=2)

    def tell_left_out(self, chain: Verifier) -> None:
        """Say in the statistics which processors levels below went without."""
        chain.stats.notes += self.law.tell_left_out()

    def output(
        self, chain: Verifier, rows: list[list[int]], origins: list[list[int]], seconds: float, ranks: Ranks
    ) -> torch.Tensor | Output:
        sequences = torch.tensor(rows, dtype=torch.long, device=self.device)
        if self._cache_is_kept():
            self._hand_back(chain, rows, waits=not ranks.in_step)
        if not self.config.return_dict_in_generate:
            return sequences
        stats = PolySpecStats(
            [level.stats for level in levels_of(chain)],
            origins,
            sum(len(row) for row in origins),
            seconds,
            decisions=[] if self.control is None else self.control.decisions,
            bias=self.bias,
            seed_holds=None if self.chances is None else self.chances.holds,
            chosen=self.chosen,
            placement=placement(self.placed),
        )
        output = made_output(
            self.whole_cache if self.use_cache else None,
            None if self.encoded is None else self.encoded.outputs,
            sequences=sequences,
            cross_attentions=self.recorder.crossed(),
            **self.recorder.shown(),
        )
        output.polyspec = ranks.told(stats) if ranks.in_step else stats
        return output

    def _pieces(self) -> list[int]:
        """Columns that plain generation feeds to read the prompt, one pass after another."""
        columns = max(1, len(self.context.ids[0]) - self.cached)  # the last token is read again where all are held
        chunk = self.config.prefill_chunk_size or columns
        return [min(chunk, columns - start) for start in range(0, columns, chunk)]

    def _rows_are_own(self, record: dict[str, Any]) -> bool:
        """Whether rows may each have their own columns, as far as what the caller gave goes."""
        odd = record or self._cache_is_special() or self.extras.any
        return self.use_cache and not odd and plainly_padded(self.context.prompt)

    def _cache_is_special(self) -> bool:
        """Whether the target begins with another cache than an empty one on its device."""
        return self.user_cache is not None and (tokens_held(self.user_cache) > 0 or rests_elsewhere(self.user_cache))

    def _padding(self) -> int:
        """Fewest columns of left padding in any row."""
        mask = self.context.prompt.mask
        return 0 if mask is None else int((mask.cumsum(-1) == 0).sum(-1).min())

    def _cache_is_kept(self) -> bool:
        """Whether anybody sees the target's cache after the call."""
        if not self.use_cache:
            return False
        if self.user_cache is None:
            return bool(self.config.return_dict_in_generate) and makes_own_cache(self.model)
        return bool(self.config.return_dict_in_generate) or is_callers(self.whole_cache)

    def _hand_back(self, chain: Verifier, rows: list[list[int]], *, waits: bool) -> None:
        """Extend the cache that generate() prepared, or the caller brought, to all but the last token."""
        hidden = len(self.context.ids[0]) - self.visible
        front = [ids[:hidden] for ids in self.context.ids]
        final = Context([f + row[:-1] for f, row in zip(front, rows, strict=True)], self.context.prompt)
        waits = waits and self.encoded is None and not self.extras.any
        self.whole_cache = hand_back(chain.runner, chain.stats, final, self.whole_cache, self.cached, waits=waits)
