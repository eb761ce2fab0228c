# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server on a chain, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import tiny_models
import torch
from live_tensors import grows_every_time
from starlette.concurrency import run_in_threadpool
from tiny_checkpoints import byte_tokenizer
from transformers import GenerationConfig
from typer.testing import CliRunner

import hf_polyspec
from hf_polyspec import Drafter, SuffixDrafter
from hf_polyspec.cli import app, serve
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.host import serving, streaming
from hf_polyspec.integrations import server as server_module
from hf_polyspec.integrations.prometheus import Metrics
from hf_polyspec.integrations.server import ChainServer

POOL = 40
"""Workers of the web server, at most."""
PATIENCE = 120.0
"""Seconds within which anything happens, however busy the machine."""
TOKENIZER = byte_tokenizer()
UTILS = importlib.import_module("transformers.cli.serving.utils")
ASKED = [{"role": "user", "content": "abcabcabc"}]
FOR_ONE = {"model": "tiny", "messages": ASKED, "temperature": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.tiny("llama", vocab_size=len(TOKENIZER), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def small(model: Any) -> Any:
    return tiny_models.noisy(model, 0.03)


class Leaving(SuffixDrafter):
    """Follows rows that leave and none that join, which an engine does not serve."""

    add_rows = Drafter.add_rows

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)


TOGETHER: type[SuffixDrafter] = SuffixDrafter
IN_TURN = Leaving


@pytest.fixture(scope="module", params=[TOGETHER, IN_TURN], ids=["together", "in turn"])
def server(model: Any, small: Any, request: pytest.FixtureRequest) -> Iterator[ChainServer]:
    with ChainServer(model, TOKENIZER, [small, request.param()], name="tiny", port=0) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: ChainServer) -> Iterator[openai.OpenAI]:
    with ask(server) as made:
        yield made


def ask(server: ChainServer, **settings: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, **settings)


def prompt(text: str) -> Any:
    """What the tokenizer makes of a user's words."""
    asked = [{"role": "user", "content": text}]
    return TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def plain(model: Any, text: str, tokens: int, template: bool = True, **settings: Any) -> str:
    """What the model's own generate() answers."""
    ids = prompt(text) if template else TOKENIZER(text, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, **{"do_sample": False, **settings})
    return str(TOKENIZER.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def joined(stream: Any) -> str:
    return "".join(part.choices[0].delta.content or "" for part in stream)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def post_and_go(server: ChainServer, seen: Callable[[], bool], **asked: Any) -> None:
    """A client that asks, waits until something is seen of that, and then hangs up without an answer."""
    body = json.dumps({**FOR_ONE, **asked}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        until(seen)


def test_every_door_gives_the_text_of_plain_generate(model: Any, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**FOR_ONE, max_tokens=40)
    assert chat.choices[0].message.content == plain(model, "abcabcabc", 40)
    assert chat.choices[0].finish_reason == "length"
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (10, 40)  # type: ignore[union-attr]
    assert (
        joined(client.chat.completions.create(**FOR_ONE, max_tokens=40, stream=True)) == chat.choices[0].message.content
    )
    asked: Any = {"model": "tiny", "temperature": 0}
    response = client.responses.create(input="abcabcabc", max_output_tokens=40, **asked)
    assert response.output_text == chat.choices[0].message.content
    events = client.responses.create(input="abcabcabc", max_output_tokens=40, stream=True, **asked)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == response.output_text
    text = client.completions.create(prompt="abcabcabc", max_tokens=40, **asked).choices[0].text
    assert text == plain(model, "abcabcabc", 40, template=False)
    assert [each.id for each in client.models.list()] == ["tiny"]


def test_stop_strings_end_a_text(model: Any, client: openai.OpenAI) -> None:
    whole = plain(model, "abcabcabc", 40)
    stop = next(letter for letter in whole[5:] if letter.isascii() and letter.isprintable())
    answer = client.chat.completions.create(**FOR_ONE, max_tokens=40, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop) + 1]
    assert answer.choices[0].finish_reason == "stop"


def test_a_seed_is_its_requests_own(model: Any, client: openai.OpenAI) -> None:
    """Requests that come at once with different seeds each get the text that plain generate() draws after theirs."""
    state = torch.get_rng_state()

    def one(seed: int) -> str | None:
        asked: Any = {**FOR_ONE, "temperature": 0.8}
        return client.chat.completions.create(**asked, max_tokens=24, seed=seed).choices[0].message.content

    seeds = [3, 4, 3, 5]
    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(one, seeds))
    assert torch.equal(torch.get_rng_state(), state)
    for seed, text in zip(seeds, texts, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assert text == plain(model, "abcabcabc", 24, do_sample=True, temperature=0.8)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"messages": "hello"}, "cannot be read"),
    "no role": ({"messages": [{"content": "hello"}]}, "'role' is missing"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "'type' is missing"),
    "length": ({"max_tokens": -3}, "max_new_tokens"),
    "length of another kind": ({"max_tokens": "many"}, "cannot be read"),
    "temperature": ({"temperature": -1}, "temperature"),
    "seed": ({"seed": "x"}, "seed must be a whole number"),
    "model": ({"model": "other"}, "pinned to 'tiny'"),
    "broken config": ({"extra_body": {"generation_config": "{"}}, "cannot be read"),
    "beams": ({"extra_body": {"generation_config": json.dumps({"num_beams": 3, "max_new_tokens": 4})}}, "num_beams"),
    "unknown field": ({"extra_body": {"colour": 1}}, "colour"),
}


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_in_a_sentence(client: openai.OpenAI, case: tuple[dict[str, Any], str]) -> None:
    asked, said = case
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{**FOR_ONE, "max_tokens": 4, **asked})
    assert refused.value.status_code in (400, 422)
    assert said in refused.value.message
    assert refused.value.body["type"] == "invalid_request_error"  # type: ignore[index]


def test_what_cannot_be_streamed_is_told(client: openai.OpenAI) -> None:
    """Before the stream where requests are checked as they come, inside it where each begins by itself."""
    with pytest.raises(openai.APIError) as refused:
        joined(client.chat.completions.create(**FOR_ONE, max_tokens=-3, stream=True))
    assert "max_new_tokens" in str(refused.value.body)


def test_bodies_that_are_none_and_roads_that_lead_nowhere(server: ChainServer) -> None:
    url = f"http://127.0.0.1:{server.port}"
    for body, status in ((b"{", 422), (b"[1]", 422), (b"\xff", 400)):
        answer = requests.post(f"{url}/v1/chat/completions", data=body, headers={"content-type": "application/json"})
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert requests.post(f"{url}/v1/audio/transcriptions", data=b"").status_code == 501
    assert requests.get(f"{url}/nothing").status_code == 404
    assert requests.get(f"{url}/health").json() == {"status": "ok"}
    requests.post(f"{url}/reset")  # which unloads what transformers' server has loaded
    assert requests.get(f"{url}/v1/models").json()["data"][0]["status"] == {"value": "loaded"}


class Slow(SuffixDrafter):
    """Never drafts, and takes its time for that: a text of 800 tokens takes longer than anybody here waits."""

    def propose(self, context: Context, limits: list[int], law: Any) -> Proposal:
        time.sleep(0.01 if len(context.ids[0]) < 40 else PATIENCE / 500)
        return Proposal([[] for _ in limits], None, [[] for _ in limits])


@pytest.fixture(params=["together", "in turn"])
def slow(model: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ChainServer]:
    """One request at a time, in either way. (A control would not ask this drafter again.)"""

    def refused(*_: Any, **__: Any) -> None:
        raise ValueError("none today.")

    if request.param == "in turn":
        monkeypatch.setattr(server_module, "Together", refused)
    fixed = {"polyspec_control": "fixed"}
    with ChainServer(model, TOKENIZER, [Slow()], name="tiny", port=0, slots=1, options=fixed) as started:
        yield started


def test_a_client_that_goes_away_ends_its_generation(model: Any, slow: ChainServer) -> None:
    """What is generated of a text says when it ended."""
    seen = slow.metrics

    def aborted() -> float:
        return seen.value("vllm:request_success_total", finished_reason="abort")

    def asked() -> float:
        return seen.value("vllm:prompt_tokens_total")

    def begun() -> float:
        return seen.value("vllm:time_to_first_token_seconds_count")

    def tokens() -> float:
        return seen.value("vllm:generation_tokens_total")

    with ask(slow) as client:
        stream = client.chat.completions.create(**FOR_ONE, max_tokens=800, stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: aborted() == 1)
        assert tokens() < 800
        post_and_go(slow, lambda: seen.value("vllm:num_requests_running") == 1, max_tokens=800)
        until(lambda: aborted() == 2)
        assert tokens() < 1600
        # One that still waits is never begun.
        earlier = begun()
        stream = client.chat.completions.create(**FOR_ONE, max_tokens=800, stream=True)
        until(lambda: begun() == earlier + 1)
        before = asked()
        post_and_go(slow, lambda: asked() == before + 10, max_tokens=800)
        assert seen.value("vllm:num_requests_running") == 1
        stream.close()
        until(lambda: aborted() == 4)
        assert begun() == earlier + 1
        answer = client.chat.completions.create(**FOR_ONE, max_tokens=8).choices[0].message.content
    assert answer == plain(model, "abcabcabc", 8)
    assert seen.value("vllm:num_requests_running") == seen.value("vllm:num_requests_waiting") == 0


def test_stopping_ends_what_runs_and_what_waits(slow: ChainServer) -> None:
    def one(_: int) -> None:
        with ask(slow) as client, contextlib.suppress(openai.APIError):  # or the stream just ends
            joined(client.chat.completions.create(**FOR_ONE, max_tokens=800, stream=True))

    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(one, i) for i in range(3)]
        until(lambda: slow.metrics.value("vllm:prompt_tokens_total") == 30)
        slow.stop()
        assert slow.metrics.value("vllm:generation_tokens_total") < 800  # not one of the three was written
        for each in waiting:
            each.result(timeout=PATIENCE)


def test_two_hundred_requests_leave_nothing_behind(model: Any, small: Any) -> None:
    """Eight clients at once, every fifth request bad or given up; every other answer is right."""
    prompts = ["abcabc", "xyzxyz", "hello hello"]
    # A stream withholds bytes that are half a character, so the texts end with a whole one.
    found = [[(n, plain(model, each, n)) for n in range(8, 24)] for each in prompts]
    right = [next((n, text) for n, text in texts if not text.endswith("\ufffd")) for texts in found]

    def one(i: int) -> bool:
        tokens, text = right[i % 3]
        asked: Any = {**FOR_ONE, "messages": [{"role": "user", "content": prompts[i % 3]}], "max_tokens": tokens}
        if i % 10 == 3:
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**{**asked, "max_tokens": -1})
            return True
        if i % 10 == 7:
            client.chat.completions.create(**{**asked, "max_tokens": 400}, stream=True).close()
            return True
        if i % 2:
            return joined(client.chat.completions.create(**asked, stream=True)) == text
        return client.chat.completions.create(**asked).choices[0].message.content == text

    def all_done() -> bool:
        seen = server.metrics
        return seen.value("vllm:num_requests_running") == seen.value("vllm:num_requests_waiting") == 0

    def ask_a_hundred() -> None:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(one, range(100)))
        until(all_done)
        assert one(0)  # so that what is left of the last one is left of the same one
        until(all_done)
        time.sleep(0.2)  # what the last request leaves for a moment

    async def pool() -> type[threading.Thread]:
        return type(await run_in_threadpool(threading.current_thread))

    worker = asyncio.run(pool())

    def threads() -> set[threading.Thread]:
        """But for the web server's pool, whose workers come when several requests meet, up to its own bound."""
        return {each for each in threading.enumerate() if type(each) is not worker}

    at_rest = set(threading.enumerate())
    with ChainServer(model, TOKENIZER, [small, "suffix"], name="tiny", port=0) as server, ask(server) as client:
        ask_a_hundred()
        in_use = threads()
        assert not grows_every_time(ask_a_hundred)
        assert threads() - at_rest == in_use - at_rest
        assert in_use - at_rest
        assert len(threading.enumerate()) - len(in_use) <= POOL
    until(lambda: at_rest >= set(threading.enumerate()))


def test_metrics_are_those_of_the_chain(model: Any, small: Any) -> None:
    """One request, beside the statistics of the same generation in process."""
    options = {"num_assistant_tokens": 3, "polyspec_control": "fixed"}
    with ChainServer(
        model, TOKENIZER, [small], name="tiny", port=0, options=options
    ) as server, ask(server) as client:  # fmt: skip
        client.chat.completions.create(**FOR_ONE, max_tokens=40)
        shown = requests.get(f"http://127.0.0.1:{server.port}/metrics")
    ids = prompt("abcabcabc")
    out = hf_polyspec.generate(
        model, **ids, assistant_models=[small], num_assistant_tokens=3, max_new_tokens=40, return_dict_in_generate=True
    )
    target = out.polyspec.levels[0]
    assert shown.headers["content-type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in shown.text.splitlines() if not line.startswith("#"))

    def value(name: str, labels: str = "") -> float:
        return float(lines[f'{name}{{model_name="tiny"{labels}}}'])

    assert value("vllm:spec_decode_num_accepted_tokens_total") == target.accepted > 0
    assert value("vllm:spec_decode_num_draft_tokens_total") == target.drafted
    assert value("vllm:spec_decode_num_drafts_total") == target.drafted_at[0]
    per_position = [value("vllm:spec_decode_num_accepted_tokens_per_pos_total", f',position="{i}"') for i in range(3)]
    assert per_position == target.accepted_at
    assert value("vllm:generation_tokens_total") == 40
    assert value("vllm:prompt_tokens_total") == 10
    ended = lines['vllm:request_success_total{finished_reason="length",model_name="tiny"}']
    assert ended == "1.0"


def test_nobody_else_can_reach_it_unless_told(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hf_polyspec.serve")
    with ChainServer(model, TOKENIZER, ["suffix"], name="tiny", port=0) as server:
        assert server._server.servers[0].sockets[0].getsockname()[0] == "127.0.0.1"
        assert "up to 8 at a time" in caplog.text
        assert "other machines" not in caplog.text
    with ChainServer(model, TOKENIZER, ["suffix"], name="tiny", host="0.0.0.0", port=0):
        assert "can be reached from other machines" in caplog.text


def test_what_an_engine_does_not_serve_runs_in_turn_and_is_logged(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hf_polyspec.serve")
    with ChainServer(model, TOKENIZER, [IN_TURN()], name="tiny", port=0):
        assert "one after the other (assistant_models[0] (suffix) follows rows that leave" in caplog.text


@pytest.mark.parametrize("given", ["suffix", "auto", ["auto"]])
def test_a_name_is_a_list_of_one(model: Any, given: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # "auto" measures, and keeps what it found
    with ChainServer(model, TOKENIZER, given, name="tiny", port=0) as server, ask(server) as client:
        text = client.chat.completions.create(**FOR_ONE, max_tokens=8).choices[0].message.content
        how = server._how
    assert text == plain(model, "abcabcabc", 8)
    assert how == "up to 8 at a time"


def test_a_server_that_is_full_says_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def submit(self, *_: Any) -> Any:
            raise hf_polyspec.QueueFullError("1024 requests wait already")

        def close(self) -> None:
            pass

    monkeypatch.setattr(server_module, "_work", lambda *_: (Full(), ""))
    full = ChainServer(model, TOKENIZER, ["suffix"], name="tiny", port=0)
    asked = pytest.raises(openai.InternalServerError, match="requests wait already")
    with full, ask(full) as client, asked as refused:
        client.chat.completions.create(**FOR_ONE)
    assert refused.value.status_code == 503


def test_a_port_that_is_taken_is_named(model: Any) -> None:
    before = set(threading.enumerate())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = ChainServer(model, TOKENIZER, ["suffix"], name="tiny", port=taken.getsockname()[1])
        with pytest.raises(OSError, match=r"nothing can listen at 127\.0\.0\.1:\d+: is the port taken\?"):
            server.start()
    until(lambda: before >= set(threading.enumerate()))


def test_a_chain_that_cannot_work_is_refused_before_anything_listens(model: Any) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="suffix only drafts"):
        ChainServer(model, TOKENIZER, ["suffix", "suffix"], name="tiny", port=0)
    assert before >= set(threading.enumerate())


def test_a_server_with_other_parts_is_refused_in_a_sentence(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["transformers.cli.serving.server"]
    monkeypatch.setattr(module, "build_server", lambda model_manager, engine: None)
    with pytest.raises(ImportError, match=r"not put together as this package knows it \(it asks for engine\)"):
        serving.build_app(model, TOKENIZER, "tiny", None)  # type: ignore[arg-type]


def test_the_command(model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    answers = []

    def run(self: ChainServer) -> None:
        with self, ask(self) as client:
            asked: Any = {**FOR_ONE, "model": "mine"}
            answers.append(
                (self.host, client.chat.completions.create(**asked, max_tokens=12).choices[0].message.content)
            )
            answers.append((self.port, self.metrics.value("vllm:spec_decode_num_draft_tokens_total")))

    monkeypatch.setattr(serve.ChainServer, "run", run)
    words = ["serve", str(tmp_path), "--assistant", "suffix", "--name", "mine", "--port", "0", "--draft-tokens", "2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert answers[0] == ("127.0.0.1", plain(model, "abcabcabc", 12))
    refused = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "70000"])
    assert refused.exit_code == 2
    assert "--port must be from 0 to 65535" in refused.stderr


def test_drafts_of_a_tree_count_as_its_depth() -> None:
    stats = hf_polyspec.PolySpecStats([hf_polyspec.LevelStats("target", 0)], [[0]], 1, 0.1)
    metrics = Metrics("m")
    metrics.waits(1)
    metrics.runs()
    metrics.ended("stop", 1, 0.1, stats, True)  # a text of one token, for which nothing was drafted
    assert metrics.value("vllm:spec_decode_num_drafts_total") == 0


class Loop:
    """An event loop whose time passes when it is told to."""

    def __init__(self) -> None:
        self.closed, self.now = False, 100.0
        self.woken: list[Callable[[], None]] = []
        self.later: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.woken.append(call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> None:
        self.later.append((seconds, call))

    def look(self) -> float:
        """Does what it was woken for, and what that puts off; returns for how long."""
        self.woken.pop()()
        seconds, call = self.later.pop()
        self.now += seconds
        call()
        return seconds


def test_what_comes_at_once_wakes_the_loop_once() -> None:
    """Tokens of one round; their order stays, and what comes after a loop has looked wakes it again."""
    loop, seen = Loop(), list[int]()
    calls = streaming.Gathered(loop)  # type: ignore[arg-type]
    for number in range(3):
        calls.call_soon_threadsafe(seen.append, number)
    loop.woken.pop()()
    calls.call_soon_threadsafe(seen.append, 3)  # of the same round
    assert (loop.woken, seen) == ([], [])
    loop.later.pop()[1]()
    assert seen == [0, 1, 2, 3]
    calls.call_soon_threadsafe(seen.append, 4)
    loop.look()
    assert seen == [0, 1, 2, 3, 4]
    loop.closed = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            calls.call_soon_threadsafe(seen.append, 4)


def test_a_quick_stream_is_sent_at_a_pace() -> None:
    """Its first text and its end wait for nothing but their round; a slow one never waits for longer."""
    loop, seen = Loop(), list[Any]()
    calls = streaming.Gathered(loop)  # type: ignore[arg-type]
    calls.call_soon_threadsafe(seen.append, "first")
    assert loop.look() == streaming._ROUND
    loop.now += 0.01
    calls.call_soon_threadsafe(seen.append, "next")
    assert loop.look() == pytest.approx(streaming._PACE - 0.01)
    loop.now += 1.0
    calls.call_soon_threadsafe(seen.append, "late")
    assert loop.look() == streaming._ROUND
    calls.call_soon_threadsafe(seen.append, "last")
    calls.call_soon_threadsafe(seen.append, None, last=True)
    loop.woken.pop()()
    assert seen == ["first", "next", "late", "last", None]


def test_texts_that_wait_are_sent_as_one() -> None:
    """In their order; what is no text, or of another kind, stands between."""

    class Thought(str):
        pass

    waiting = streaming.Texts()
    ended = [None]
    for item in ("a", "bc", "d", Thought("e"), Thought("f"), "g", ended, "h", None):
        waiting.put_nowait(item)
    found = [waiting.get_nowait() for _ in range(waiting.qsize())]
    assert found == ["abcd", "ef", "g", ended, "h", None]
    assert [type(item) for item in found[:3]] == [str, Thought, str]
    waiting.put_nowait("i")
    assert waiting.get_nowait() == "i"
    assert waiting.empty()


class Told:
    """Hands over tokens as a generation does: in a thread of its own, before anybody has looked."""

    def __init__(self) -> None:
        self.gone = False
        self.future: Future[list[int]] = Future()

    def cancel(self) -> None:
        self.gone = True

    def submit(self, inputs: Any, config: Any, seed: Any, tokenizer: Any, streamer: Any) -> Any:
        def run() -> None:
            streamer.put(inputs["input_ids"])
            for ids in TOKENIZER(["he", "l", "lo"])["input_ids"]:
                streamer.put(torch.tensor(ids))
            streamer.end()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return self

    def items(self) -> list[Any]:
        """What a stream is given to send, up to its end."""
        manager = serving._manager(UTILS, self)  # type: ignore[arg-type]

        async def all_of_it() -> list[Any]:
            queue, _ = manager.generate_streaming(None, TOKENIZER, prompt("abc"), GenerationConfig(), "1")
            found: list[Any] = []
            while not found or isinstance(found[-1], str):
                found.append(await queue.get())
            return found

        return asyncio.run(all_of_it())


def test_a_round_is_one_event() -> None:
    """What was generated before the loop looked goes to the client together."""
    assert Told().items() == ["hello", None]


def test_ids_become_text_in_the_thread_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the one that runs the models, which has the next round to run."""
    streamer, seen = UTILS.DirectStreamer, set[int]()
    genuine = streamer._enqueue

    def noted(self: Any, item: Any) -> None:
        seen.add(threading.get_ident())
        genuine(self, item)

    monkeypatch.setattr(streamer, "_enqueue", noted)
    Told().items()
    assert seen == {threading.get_ident()}


def test_a_text_that_cannot_be_read_ends_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, item: Any) -> None:
        raise ValueError('no "text"\nin it')

    monkeypatch.setattr(UTILS.DirectStreamer, "_enqueue", broken)
    work = Told()
    (ending,) = work.items()
    assert isinstance(ending, UTILS._StreamError)
    assert ending.msg == 'no \\"text\\" in it'
    assert work.gone
