# SPDX-License-Identifier: Apache-2.0
"""An OpenAI server on a chain: transformers' own, with our generation behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from ..generation.chain import check_assistants
from ..generation.members import leaves_choice, members
from ..generation.plan import resolve_plan
from ..host.serving import build_app
from ..levels.verifier import NoDraft
from .prometheus import CONTENT_TYPE, Metrics
from .together import Together
from .turns import Turns

_LOG = logging.getLogger("hf_polyspec.serve")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]


class ChainServer:
    """Chat completions, completions, responses, the model list, health and /metrics, for one model with its chain.

    What is answered, and how, is transformers' own server (`transformers serve`). A
    client that goes away ends its generation, streamed or not.

    Args:
        model, tokenizer: the target and its tokenizer, which stay the caller's.
        assistants: the chain, as `generate(assistant_models=...)` takes it; a name is a list of one.
        name: what clients call the model.
        options: of `generate()`, for every request: sizes of the chain, a plan.
        host: where to listen; the default can be reached from this machine alone. port: 0 for any that is free.
        slots: requests that run at a time, in rows of one batch (`hf_polyspec.Engine`). What an engine does not serve
            (models that read a batch in step, say) runs one after the other, which the log says.
        cors: whether pages of any origin may ask.

    Attributes:
        app: the FastAPI application; metrics: what /metrics shows; port: where it listens, once it has started.

    Raises:
        ImportError: the extra `hf_polyspec[serve]` is not installed, or this release's server is another one.
        ValueError, TypeError: the chain cannot work.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        assistants: str | os.PathLike[str] | Sequence[Any],
        *,
        name: str,
        options: Mapping[str, Any] | None = None,
        host: str = LOOPBACK[0],
        port: int = 8000,
        slots: int = 8,
        cors: bool = False,
    ) -> None:
        chain: Sequence[Any] = [assistants] if isinstance(assistants, (str, os.PathLike)) else assistants
        if not leaves_choice(chain, None):  # else each call chooses, after the first has measured
            chain = members(model, chain)
            check_assistants(model, chain)
        self.host, self.port = host, port
        self.metrics = Metrics(name)
        self._work, self._how = _work(model, chain, dict(options or {}), self.metrics, slots)
        try:
            self.app = build_app(model, tokenizer, name, self._work, cors=cors)
        except BaseException:
            self._work.close()
            raise
        self.app.add_api_route("/metrics", self._metrics, methods=["GET"], include_in_schema=False)
        self._server = _uvicorn(HangsUp(self.app), host, port, self._listens)
        self._listening = threading.Event()
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serves until Ctrl-C or SIGTERM."""
        try:
            self._serve()
        finally:
            self._work.close()
        if not self._listening.is_set():
            raise OSError(self._taken())

    def start(self) -> None:
        """Serves from a thread of its own until `stop()`; returns once requests are taken.

        Raises:
            OSError: the port cannot be had.
        """
        self._thread = threading.Thread(target=self._serve, name="polyspec-serve", daemon=True)
        self._thread.start()
        while not self._listening.wait(0.02):
            if not self._thread.is_alive():
                self._work.close()
                raise OSError(self._taken())

    def stop(self) -> None:
        """Ends what `start()` began; requests that are running are cut off."""
        self._work.close()
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> ChainServer:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _serve(self) -> None:
        with contextlib.suppress(SystemExit):  # so it says that it could not begin, after a line of its own
            self._server.run()

    def _taken(self) -> str:
        return f"nothing can listen at {self.host}:{self.port}: is the port taken?"

    def _listens(self) -> None:
        """Requests are taken from now on."""
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        _LOG.info("http://%s:%s/v1; requests run %s", self.host, self.port, self._how)
        if self.host not in LOOPBACK:
            _LOG.warning("%s can be reached from other machines, and whoever reaches it may ask it anything", self.host)
        self._listening.set()

    async def _metrics(self) -> Any:
        from fastapi import Response

        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _work(
    model: Any, assistants: Sequence[Any], options: dict[str, Any], metrics: Metrics, slots: int
) -> tuple[Together | Turns, str]:
    """Where requests are generated, and how, in words."""
    plan = options.pop("polyspec_plan", None)
    if plan is not None:
        assistants, sizes = resolve_plan(plan, model, assistants, options)
        options |= sizes
    try:
        return Together(model, assistants, options, metrics, slots=slots), f"up to {slots} at a time"
    except ValueError as error:
        alone = assistants or [NoDraft()]
        return Turns(model, alone, options, metrics), f"one after the other ({str(error).rstrip('.')})"


def _uvicorn(app: Any, host: str, port: int, listens: Callable[[], None]) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)  # which raises where the port cannot be had
            listens()

    settings = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)
    return Server(settings)


class HangsUp:
    """Cancels the answer to a client that has gone; frameworks only look where an answer is streamed.

    Args:
        app: an ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: _Receive, send: Any) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[_Message] = asyncio.Queue()
        answer = asyncio.ensure_future(self.app(scope, messages.get, send))
        listening = asyncio.ensure_future(_listen(receive, messages))
        await asyncio.wait((answer, listening), return_when=asyncio.FIRST_COMPLETED)
        late = answer if listening.done() else listening
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        if answer.done() and not answer.cancelled():
            answer.result()


async def _listen(receive: _Receive, messages: asyncio.Queue[_Message]) -> None:
    """Passes on what the client sends, until it has gone."""
    while True:
        message = await receive()
        messages.put_nowait(message)
        if message["type"] == "http.disconnect":
            return
