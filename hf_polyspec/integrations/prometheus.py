# SPDX-License-Identifier: Apache-2.0
"""What a server did, for Prometheus, under vLLM's names where it has one, so that its dashboards read it."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WHOLE = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """Counters of one server.

    A draft, in vLLM's words, is what the target was offered in one pass over one row; its tokens are the target's
    proposals. What happens between the levels below has no name there and is told by level.

    Args:
        model: the label `model_name`.
    """

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that have not begun.")
        self._running = self._gauge("vllm:num_requests_running", "Requests that are being generated.")
        self._prompts = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._ended = self._counter("vllm:request_success", "Requests that ended, by reason.", "finished_reason")
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From request to token.", _FIRST_TOKEN)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From request to end.", _WHOLE)
        self._drafts = self._counter("vllm:spec_decode_num_drafts", "Drafts that the model checked.")
        self._drafted = self._counter("vllm:spec_decode_num_draft_tokens", "Tokens of those drafts.")
        self._accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "Of those, tokens it accepted.")
        self._accepted_at = self._counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "The same by place in the draft.", "position"
        )
        self._passes = self._counter("polyspec:forward_passes", "Forward passes, by level of the chain.", "level")
        self._seconds = self._counter("polyspec:level_seconds", "Time spent, by level of the chain.", "level")

    def waits(self, prompt_tokens: int) -> None:
        """A request has come."""
        self._waiting.inc()
        self._prompts.inc(prompt_tokens)

    def runs(self) -> None:
        """One that waited has begun."""
        self._waiting.dec()
        self._running.inc()

    def first_token(self, seconds: float) -> None:
        """Its first token came so long after it."""
        self._first.observe(seconds)

    def ended(self, how: str, new_tokens: int, seconds: float, stats: Any, begun: bool) -> None:
        """A request is over.

        Args:
            how: stop, length, abort or error; new_tokens: what it generated; seconds: since it came.
            stats: a `PolySpecStats`, or None where there is none; begun: whether it ever ran.
        """
        (self._running if begun else self._waiting).dec()
        self._ended.labels(self._model, how).inc()
        self._tokens.inc(new_tokens)
        if how in ("stop", "length"):
            self._whole.observe(seconds)
        if stats is not None:
            self._count(stats)

    def _count(self, stats: Any) -> None:
        target = stats.levels[0]
        self._drafts.inc(sum(target.drafted_at[:1]))
        self._drafted.inc(target.drafted)
        self._accepted.inc(target.accepted)
        for i, count in enumerate(target.accepted_at):
            self._accepted_at.labels(self._model, str(i)).inc(count)
        for level in stats.levels:
            name = f"{level.index} {level.name}"
            self._passes.labels(self._model, name).inc(level.forward_passes)
            self._seconds.labels(self._model, name).inc(level.seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self._registry)

    def value(self, name: str, **labels: str) -> float:
        """A sample as it is shown, 0 where it has not been counted yet."""
        found = self._registry.get_sample_value(name, {"model_name": self._model, **labels})
        return 0.0 if found is None else found

    def _counter(self, name: str, what: str, *labels: str) -> Any:
        made = Counter(name, what, ("model_name", *labels), registry=self._registry)
        return made if labels else made.labels(self._model)

    def _gauge(self, name: str, what: str) -> Any:
        return Gauge(name, what, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
        made = Histogram(name, what, ("model_name",), registry=self._registry, buckets=buckets)
        return made.labels(self._model)
