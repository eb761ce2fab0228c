# SPDX-License-Identifier: Apache-2.0
"""Requests that are cancelled, fail or wait, engines that are closed, and who may ask for what from where."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from typing import Any

import pytest
import torch
from live_tensors import grows_every_time
from tiny_models import noisy, tiny
from transformers import LogitsProcessor, StoppingCriteria

import hf_polyspec
from hf_polyspec import Drafter, Engine, EngineClosedError, LevelError, QueueFullError, SuffixDrafter
from hf_polyspec.engine.request import Handle, Request

LONG = {"max_new_tokens": 100, "do_sample": False}
SHORT = {"max_new_tokens": 6, "do_sample": False}
PROMPT = [7, 3, 9]
PATIENCE = 240.0
"""Seconds within which anything happens, however busy the machine."""


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def drafter(target: Any) -> Any:
    return noisy(target, 0.2, seed=2)


def plain(target: Any, ids: list[int], **options: Any) -> torch.Tensor:
    text: torch.Tensor = target.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **options)
    return text


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def threads() -> set[threading.Thread]:
    """Those of engines."""
    return {each for each in threading.enumerate() if each.name == "hf_polyspec engine"}


class Gate:
    """A streamer that holds the engine's thread at the first token until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def put(self, values: torch.Tensor) -> None:
        if values.dim() == 1:
            self.reached.set()
            assert self.opened.wait(PATIENCE)

    def end(self) -> None:
        pass


class Fails(LogitsProcessor):
    """Raises at the fourth new token."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length + 3:
            raise ZeroDivisionError("of the caller's own")
        return scores


class Stops(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        raise ZeroDivisionError("of the caller's own")


class Chokes:
    """A streamer that takes the prompt and two tokens."""

    def __init__(self) -> None:
        self.taken = 0

    def put(self, values: torch.Tensor) -> None:
        self.taken += 1
        if self.taken > 3:
            raise ZeroDivisionError("of the caller's own")

    def end(self) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (lambda: {"logits_processor": [Fails(len(PROMPT))]}, 3),
        (lambda: {"stopping_criteria": [Stops()]}, 1),
        (lambda: {"streamer": Chokes()}, 3),
    ],
    ids=["a processor", "a criterion", "a streamer"],
)
def test_what_fails_by_itself_ends_alone(
    target: Any, drafter: Any, given: Callable[[], dict[str, Any]], tokens: int
) -> None:
    ids, what = [[8, 9, 10, 11], [4, 5]], given()
    with Engine(target, [drafter], slots=3) as engine:
        beside = [engine.submit(one, **LONG) for one in ids]
        failing = engine.submit(PROMPT, **LONG, **what)
        later = engine.submit(PROMPT, **SHORT)
        assert isinstance(failing.exception(PATIENCE), ZeroDivisionError)
        for one, handle in zip(ids, beside, strict=True):
            assert torch.equal(handle.result(PATIENCE), plain(target, one, **LONG))
        assert torch.equal(later.result(PATIENCE), plain(target, PROMPT, **SHORT))
    assert failing.tokens == plain(target, PROMPT, **LONG)[0, 3 : 3 + len(failing.tokens)].tolist()
    assert 0 < len(failing.tokens) <= tokens  # those of the round that failed are lost


def test_a_processor_with_a_state_sees_its_own_text(target: Any, drafter: Any) -> None:
    class Notes(LogitsProcessor):
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.seen.append(input_ids[0].tolist())
            return scores - 100.0 * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1])

    alone = Notes()
    text = plain(target, PROMPT, logits_processor=[alone], **SHORT)
    beside = Notes()
    with Engine(target, [drafter], slots=3) as engine:
        others = [engine.submit([4 + i, 9], **LONG) for i in range(2)]
        assert torch.equal(engine.submit(PROMPT, logits_processor=[beside], **SHORT).result(PATIENCE), text)
        assert all(torch.equal(one.result(PATIENCE), plain(target, [4 + i, 9], **LONG)) for i, one in enumerate(others))
    assert beside.seen == alone.seen


def test_a_level_that_fails_ends_what_runs_and_not_the_engine(target: Any) -> None:
    class Breaks(Drafter):
        name = "breaks"
        broken = True

        def propose(self, context: Any, limits: list[int], law: Any) -> Any:
            if self.broken and any(len(ids) > 8 for ids in context.ids):
                raise RuntimeError("no more")
            return hf_polyspec.Proposal([[] for _ in limits], None, [[] for _ in limits])

    level = Breaks()
    with Engine(target, [level], slots=2) as engine:
        running = [engine.submit([4 + i, 9], **LONG) for i in range(2)]
        for handle in running:
            with pytest.raises(LevelError, match=r"assistant_models\[0\] \(breaks\) failed to propose: no more"):
                handle.result(PATIENCE)
        level.broken = False
        assert torch.equal(engine.submit(PROMPT, **SHORT).result(PATIENCE), plain(target, PROMPT, **SHORT))


def test_cancelling(target: Any, drafter: Any) -> None:
    gate = Gate()
    with Engine(target, [drafter], slots=1, queue=2) as engine:
        running = engine.submit(PROMPT, streamer=gate, **LONG)
        assert gate.reached.wait(PATIENCE)
        waiting, last = engine.submit([5, 6], **LONG), engine.submit(PROMPT, **SHORT)
        assert waiting.cancel()
        assert waiting.cancelled()
        instead = engine.submit([5, 6, 7], timeout=0, **SHORT)  # its place was free at once
        assert running.cancel()
        gate.opened.set()
        assert torch.equal(last.result(PATIENCE), plain(target, PROMPT, **SHORT))
        assert torch.equal(instead.result(PATIENCE), plain(target, [5, 6, 7], **SHORT))
        assert not last.cancel()
    for handle in (running, waiting):
        with pytest.raises(CancelledError):
            handle.result()
    assert running.tokens == plain(target, PROMPT, **LONG)[0, 3 : 3 + len(running.tokens)].tolist()
    assert 0 < len(running.tokens) < 100


def test_the_queue_is_bounded(target: Any) -> None:
    gate = Gate()
    with Engine(target, slots=1, queue=1) as engine:
        first = engine.submit(PROMPT, streamer=gate, **SHORT)
        assert gate.reached.wait(PATIENCE)
        second = engine.submit(PROMPT, **SHORT)
        with pytest.raises(QueueFullError, match=r"1 requests wait already \(queue=1\)"):
            engine.submit(PROMPT, timeout=0, **SHORT)
        began = time.monotonic()
        with pytest.raises(QueueFullError, match=r"within 0\.05 s"):
            engine.submit(PROMPT, timeout=0.05, **SHORT)
        assert time.monotonic() - began >= 0.05
        threading.Timer(0.05, gate.opened.set).start()
        third = engine.submit(PROMPT, **SHORT)  # waits
        assert all(torch.equal(one.result(PATIENCE), plain(target, PROMPT, **SHORT)) for one in (first, second, third))


def test_no_more_tokens_than_memory_was_promised_for(target: Any, drafter: Any) -> None:
    most, asked = 0, threading.Event()

    class Counts:
        def put(self, values: torch.Tensor) -> None:
            nonlocal most
            assert asked.wait(PATIENCE)  # by then all wait who come
            most = max(most, sum(request.prepared.tokens for request in engine._crew.running))

        def end(self) -> None:
            pass

    with Engine(target, [drafter], slots=8, max_total_tokens=30) as engine:
        with pytest.raises(ValueError, match="may come to hold 103 tokens, and all together may hold"):
            engine.submit(PROMPT, **LONG)
        handles = [engine.submit(PROMPT, streamer=Counts(), **SHORT) for _ in range(7)]
        asked.set()
        assert all(torch.equal(one.result(PATIENCE), plain(target, PROMPT, **SHORT)) for one in handles)
    assert most == 27


def test_any_thread_may_ask(target: Any, drafter: Any) -> None:
    wanted = [[3 + i, 9, 4] for i in range(12)]
    with Engine(target, [drafter], slots=4, queue=2) as engine:

        def ask(ids: list[int]) -> tuple[list[int], torch.Tensor, list[int]]:
            handle = engine.submit(ids, **SHORT)
            return ids, handle.result(PATIENCE), list(handle)

        with ThreadPoolExecutor(6) as pool:
            for done in as_completed([pool.submit(ask, ids) for ids in wanted]):
                ids, text, tokens = done.result()
                assert torch.equal(text, plain(target, ids, **SHORT))
                assert tokens == text[0, len(ids) :].tolist()


def test_tokens_come_one_after_the_other(target: Any, drafter: Any) -> None:
    gate = Gate()
    with Engine(target, [drafter], slots=2) as engine:
        handle = engine.submit(PROMPT, streamer=gate, **SHORT)
        assert gate.reached.wait(PATIENCE)
        assert not handle.done()
        gate.opened.set()
        assert [*PROMPT, *handle] == plain(target, PROMPT, **SHORT)[0].tolist()
        failing = engine.submit(PROMPT, logits_processor=[Fails(3)], **LONG)
        found: list[int] = []
        with pytest.raises(ZeroDivisionError):
            found.extend(failing)
        assert found == failing.tokens != []


def test_asyncio(target: Any, drafter: Any) -> None:
    gate = Gate()

    async def main(engine: Engine) -> None:
        texts = await asyncio.gather(*(engine.submit([3 + i, 9], **SHORT) for i in range(5)))
        assert all(torch.equal(text, plain(target, [3 + i, 9], **SHORT)) for i, text in enumerate(texts))
        handle = engine.submit(PROMPT, **LONG)
        assert [*PROMPT, *[token async for token in handle]] == plain(target, PROMPT, **LONG)[0].tolist()
        given_up = engine.submit(PROMPT, streamer=gate, **LONG)
        task = asyncio.ensure_future(_result(given_up))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert given_up.cancelled()
        gate.opened.set()

    with Engine(target, [drafter], slots=3) as engine:
        asyncio.run(asyncio.wait_for(main(engine), PATIENCE))


async def _result(handle: Any) -> Any:
    return await handle


def test_closing(target: Any, drafter: Any) -> None:
    suffix, others = SuffixDrafter(), threads()
    engine = Engine(target, [suffix], slots=1)
    handles = [engine.submit(PROMPT, **SHORT) for _ in range(3)]
    with pytest.raises(ValueError, match=r"assistant_models\[0\]"):
        Engine(target, [_Alone()], slots=2)
    engine.close()
    assert engine.closed
    assert all(torch.equal(one.result(0), plain(target, PROMPT, **SHORT)) for one in handles)
    with pytest.raises(EngineClosedError, match="the engine is closed"):
        engine.submit(PROMPT, **SHORT)
    engine.close()  # again: nothing
    assert others >= threads()

    engine, gate = Engine(target, [drafter], slots=1), Gate()
    handles = [engine.submit(PROMPT, streamer=gate, **LONG) for _ in range(3)]
    assert gate.reached.wait(PATIENCE)
    handles[-1].add_done_callback(lambda _: gate.opened.set())
    engine.close(cancel=True)
    assert all(one.done() for one in handles)
    assert handles[-1].cancelled()

    def interrupted() -> None:
        with Engine(target, slots=1) as engine:
            handles.append(engine.submit(PROMPT, **LONG))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert handles[-1].done()


class _Alone(Drafter):
    """Follows rows that leave, and none that join."""

    name = "alone"

    def propose(self, context: Any, limits: list[int], law: Any) -> Any:
        return hf_polyspec.Proposal([[] for _ in limits], None, [[] for _ in limits])

    def keep_rows(self, rows: list[int]) -> None:
        pass


def test_nothing_is_left_of_an_engine(target: Any, drafter: Any) -> None:
    def gone(it: Any) -> bool:
        gc.collect()
        return it() is None

    others = threads()
    engine = Engine(target, [drafter], slots=2)
    crew, handle = weakref.ref(engine._crew), engine.submit(PROMPT, **SHORT)
    loop = weakref.ref(engine._crew._loop)  # type: ignore[arg-type]
    text = handle.result(PATIENCE)
    until(lambda: gone(loop))  # caches go when nobody has a place
    del engine, handle
    until(lambda: gone(crew))  # nobody closed it, and nobody holds it
    assert torch.equal(text, plain(target, PROMPT, **SHORT))
    until(lambda: others >= threads())


def asked_for() -> list[Any]:
    """Requests that are in memory, those of other tests' engines included."""
    gc.collect()
    return [each for each in gc.get_objects() if type(each) in (Request, Handle)]


@pytest.mark.parametrize("kind", ["suffix", "copy"])
def test_requests_leave_nothing_behind(target: Any, drafter: Any, kind: str) -> None:
    draw = random.Random(0)
    others = asked_for()  # which stay while they are held here

    def ask_a_hundred() -> None:
        asked = [draw.choices(range(48), k=draw.randrange(2, 30)) for _ in range(100)]
        handles = [
            engine.submit(ids, max_new_tokens=2 + i % 16, do_sample=i % 3 == 0, seed=i) for i, ids in enumerate(asked)
        ]
        for handle in handles:
            handle.result(PATIENCE)

    with Engine(target, [SuffixDrafter() if kind == "suffix" else drafter]) as engine:
        assert not grows_every_time(ask_a_hundred)
        until(lambda: len(asked_for()) == len(others))  # the thread may still hold the last round's


def test_a_handle_keeps_its_engine(target: Any) -> None:
    assert torch.equal(Engine(target).submit(PROMPT, **SHORT).result(PATIENCE), plain(target, PROMPT, **SHORT))


PROGRAM = """
import sys
sys.path.insert(0, "tests")
from tiny_models import tiny
from hf_polyspec import Engine
engine = Engine(tiny(max_position_embeddings=1 << 20), slots=2)
handles = [engine.submit([3, 4], max_new_tokens=1000000, do_sample=False) for _ in range(5)]
next(iter(handles[0]))
print("leaving")
"""


def test_a_program_ends_without_closing() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr
    assert not done.stderr


def test_an_unseeded_request_draws_its_seed_when_it_is_submitted(target: Any, drafter: Any) -> None:
    sampled = {"do_sample": True, "max_new_tokens": 8, "top_k": 0}
    with Engine(target, [drafter], slots=2) as engine:
        torch.manual_seed(11)
        handles = [engine.submit(PROMPT, **sampled) for _ in range(3)]
        state = torch.get_rng_state()
        texts = [handle.result(PATIENCE) for handle in handles]
        assert engine.submit(PROMPT, **SHORT).seed is None
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(11)
        again = [engine.submit(PROMPT, **sampled) for _ in range(3)]
        assert [one.seed for one in again] == [one.seed for one in handles]
    assert len({one.seed for one in handles}) == 3
    for handle, text in zip(handles, texts, strict=True):
        torch.manual_seed(handle.seed)
        assert torch.equal(plain(target, PROMPT, **sampled), text)


def test_statistics_are_a_requests_own(target: Any) -> None:
    right = noisy(target, 0.0)
    with Engine(target, [right], slots=2, num_assistant_tokens=4, polyspec_control="fixed") as engine:
        long, short = engine.submit(PROMPT, **LONG), engine.submit([4, 5], max_new_tokens=1, do_sample=False)
        output = engine.submit(PROMPT, return_dict_in_generate=True, output_scores=True, **SHORT).result(PATIENCE)
        long.result(PATIENCE)
    assert long.polyspec is not None
    assert short.polyspec is not None
    assert (long.polyspec.new_tokens, short.polyspec.new_tokens, output.polyspec.new_tokens) == (100, 1, 6)
    assert len(long.polyspec.token_levels[0]) == 100
    of_target, of_drafter = long.polyspec.levels
    assert of_target.emitted == 100
    assert of_drafter.accepted == of_target.accepted > 70
    assert short.polyspec.levels[0].rounds == 1
    alone = target.generate(torch.tensor([PROMPT]), return_dict_in_generate=True, output_scores=True, **SHORT)
    torch.testing.assert_close(torch.stack(output.scores), torch.stack(alone.scores))


def test_what_counts_ends_with_a_requests_own_text(target: Any) -> None:
    """With ids that end it which are not the engine's, nothing behind its end is counted."""
    ends = plain(target, PROMPT, **LONG)[0, 3 + 7].item()
    with Engine(target, [noisy(target, 0.0)], slots=2, num_assistant_tokens=6) as engine:
        handle = engine.submit(PROMPT, eos_token_id=ends, **LONG)
        new = handle.result(PATIENCE).shape[1] - 3
    assert torch.equal(handle.result(), plain(target, PROMPT, eos_token_id=ends, **LONG))
    assert handle.polyspec is not None
    assert handle.polyspec.levels[0].emitted == handle.polyspec.new_tokens == new


REFUSED = {
    "an empty prompt": ({"prompt": []}, "the prompt is empty"),
    "two rows": ({"prompt": [[1, 2], [3, 4]]}, "several rows; submit each prompt by itself"),
    "text": ({"prompt": "text"}, "needs a tokenizer"),
    "nothing": ({"prompt": None}, "a prompt is text, or token ids"),
    "a float": ({"prompt": [1.5]}, "whole numbers of one row, got 1.5"),
    "beams": ({"num_beams": 3}, "num_beams"),
    "several": ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2 in a request"),
    "a chain's option": ({"polyspec_block_size": 3}, "polyspec_block_size holds for all requests"),
    "levels": ({"assistant_models": ["int8"]}, "the levels are the engine's"),
    "a cache": ({"past_key_values": object()}, "submit() does not take past_key_values"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not served"),
    "two seeds": ({"seed": 1, "polyspec_seed": 2}, "seed and polyspec_seed are one thing"),
    "no seed": ({"seed": 1.5}, "seed must be a whole number"),
    "a wait": ({"timeout": -1}, "timeout must be a number of seconds"),
    "stop strings": ({"stop_strings": ["a"]}, "stop_strings need the tokenizer"),
    "an unknown option": ({"max_tokens": 3}, "max_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_come_before_any_work(target: Any, engine: Engine, name: str) -> None:
    given, words = REFUSED[name]
    with pytest.raises((ValueError, TypeError)) as caught:
        engine.submit(**{"prompt": PROMPT, **SHORT, **given})
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def engine(target: Any) -> Any:
    with Engine(target) as engine:
        yield engine


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"slots": 0}, "slots must be a whole number of at least 1"),
        ({"queue": None}, "queue must be"),
        ({"max_total_tokens": 0}, "max_total_tokens must be"),
        ({"polyspec_seed": 3}, "polyspec_seed belongs to one text"),
        ({"temperature": 3}, "no option of a chain"),
        ({"assistant_models": [3]}, r"assistant_models\[0\]"),
        ({"assistant_models": "int8"}, "an Engine is given its levels as a list, got 'int8'"),
    ],
)
def test_engines_that_cannot_be(target: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Engine(target, **given)


def test_a_batch_of_prompts(target: Any, drafter: Any) -> None:
    prompts = [torch.tensor([3, 4, 5]), [9], {"input_ids": [[0, 0, 8, 7]], "attention_mask": [[0, 0, 1, 1]]}]
    found = hf_polyspec.generate_batch(
        target, prompts, assistant_models=[drafter], slots=2, num_assistant_tokens=3, **SHORT
    )
    assert list(found) == ["req_0", "req_1", "req_2"]
    for answer, ids in zip(found.values(), ([3, 4, 5], [9], [8, 7]), strict=True):
        assert answer.prompt_ids == ids
        assert [*ids, *answer.generated_tokens] == plain(target, ids, **SHORT)[0].tolist()
        assert answer.error is None
    assert hf_polyspec.generate_batch(target, []) == {}
    sampled = hf_polyspec.generate_batch(target, [PROMPT] * 3, seeds=5, do_sample=True, max_new_tokens=5)
    assert [answer.seed for answer in sampled.values()] == [5, 6, 7]
    broken = hf_polyspec.generate_batch(target, [PROMPT, [4]], logits_processor=[Fails(3)], max_new_tokens=4)
    assert broken["req_0"].error == "of the caller's own"
    assert broken["req_1"].error is None
    with pytest.raises(ValueError, match="seeds has 1 numbers, and there are 2 prompts"):
        hf_polyspec.generate_batch(target, [PROMPT, PROMPT], seeds=[1])
    with pytest.raises(TypeError, match="inputs must be a list of prompts"):
        hf_polyspec.generate_batch(target, "text")
