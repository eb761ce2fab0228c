# SPDX-License-Identifier: Apache-2.0
"""transformers' own server (`transformers serve`) around a model that is already loaded and a way to generate.

Its parts are taken as classes: handlers read requests and write answers, a model manager hands out models, a
generation state hands out managers of generations. The last two are replaced by subclasses here, the handlers get a
shell that answers what is wrong with a request, and `build_server` puts all of them together as it does for itself.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from transformers.utils.import_utils import is_serve_available

from .streaming import Gathered, Texts, ThisThread

_SERVING = "transformers.cli.serving"
_HANDLERS = {
    "chat_handler": ("chat_completion", "ChatCompletionHandler"),
    "completion_handler": ("completion", "CompletionHandler"),
    "response_handler": ("response", "ResponseHandler"),
}
"""Arguments of `build_server` that are served, and the classes for them; other handlers refuse."""
_OF_THE_REQUEST = (ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What reading a request raises where something in it is missing or of another kind."""


class Cancelled(Exception):
    """Whoever asked has gone."""


class GenerationFailed(Exception):
    """A generation raised: `cause` says what."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Job(Protocol):
    """One request that is waiting, running or done."""

    future: Future[list[int]]
    """The new ids; `Cancelled`, or what the generation raised."""

    def cancel(self) -> None:
        """Nobody waits for it any more."""


class Work(Protocol):
    """Where requests are generated."""

    def submit(self, inputs: dict[str, Any], config: Any, seed: int | None, tokenizer: Any, streamer: Any) -> Job:
        """Takes a request and returns at once.

        Args:
            inputs: what the tokenizer made of the prompt, ids `[1, L]`.
            config: its generation config.
            seed: of its sampling, or None.
            tokenizer: for stop strings.
            streamer: gets the prompt's ids first, then new ones, one or several at a time, then its `end()` is called;
                or None.
        """


def build_app(model: Any, tokenizer: Any, name: str, work: Work, *, cors: bool = False) -> Any:
    """transformers' server as a FastAPI application.

    Args:
        model, tokenizer: what it serves; name: what clients call it.
        work: generates; cors: whether pages of any origin may ask it.

    Raises:
        ImportError: packages are missing, or this release's server has other parts than those known here.
    """
    if not is_serve_available():
        raise ImportError('serving needs fastapi, uvicorn and openai: pip install "hf_polyspec[serve]".')
    try:
        app = _Parts(model, tokenizer, name, work).build(cors)
    except (ImportError, AttributeError, TypeError) as error:
        raise ImportError(
            f"the server of this transformers release is not put together as this package knows it ({error}); "
            "use an older transformers or a newer hf_polyspec."
        ) from error
    _tell_as_openai(app)
    return app


class _Parts:
    """The classes of this release, and what is made of them."""

    def __init__(self, model: Any, tokenizer: Any, name: str, work: Work) -> None:
        self.utils = importlib.import_module(f"{_SERVING}.utils")
        self.manager = _manager(self.utils, work)
        self.models = _model_manager(model, tokenizer, name)
        self.state = _state(self.utils, self.manager)

    def build(self, cors: bool) -> Any:
        build = importlib.import_module(f"{_SERVING}.server").build_server
        known = {"model_manager": self.models, "generation_state": self.state, "enable_cors": cors}
        given: dict[str, Any] = {}
        for parameter in inspect.signature(build).parameters.values():
            if parameter.name in known:
                given[parameter.name] = known[parameter.name]
            elif parameter.name in _HANDLERS:
                given[parameter.name] = self._handler(*_HANDLERS[parameter.name])
            elif parameter.name.endswith("_handler"):
                given[parameter.name] = _NotServed()
            elif parameter.default is parameter.empty:
                raise TypeError(f"it asks for {parameter.name}")
        return build(**given)

    def _handler(self, module: str, kind: str) -> Any:
        found = getattr(importlib.import_module(f"{_SERVING}.{module}"), kind)
        return type(kind, (_Careful, found), {})(model_manager=self.models, generation_state=self.state)


class _NotServed:
    async def handle_request(self, *_: Any) -> Any:
        from fastapi import HTTPException

        raise HTTPException(501, "this server answers chat completions, completions and responses.")


class _Careful:
    """Goes before a handler's own class: what is wrong with a request is told as 400, and its seed is its own."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        from fastapi import HTTPException
        from jinja2 import TemplateError

        try:
            # Responses are streamed by transformers unless told otherwise, which OpenAI's clients do not expect.
            asked = {"stream": False} | body
            return await getattr(super(), "handle_request")(asked, request_id)  # noqa: B009 - a mixin's super
        except HTTPException:
            raise
        except GenerationFailed as failed:
            status = 400 if isinstance(failed.cause, (ValueError, TypeError)) else 500
            raise HTTPException(status, _sentence(failed.cause)) from failed
        except RuntimeError as full:
            raise HTTPException(503, _sentence(full)) from full
        except (*_OF_THE_REQUEST, TemplateError) as error:
            raise HTTPException(400, f"the request cannot be read: {_sentence(error)}") from error

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The seed is kept from transformers, which would reseed the process while another request is drawing; a
        temperature above 0 asks for sampling, as in OpenAI's interface, whatever the model's own config says."""
        seed, warmth = body.get("seed"), body.get("temperature")
        rest = body | {"seed": None, "temperature": warmth or None}
        config = getattr(super(), "_build_generation_config")(rest, *args, **kwargs)  # noqa: B009
        if warmth is not None:
            config.do_sample = float(warmth) != 0.0
        if seed is not None:
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise ValueError(f"seed must be a whole number, got {seed!r}.")
            config._request_seed = seed
        return config


def _tell_as_openai(app: Any) -> None:
    """Errors in the form in which OpenAI's clients look for them, one sentence each."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    def told(status: int, message: str) -> Any:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind, "code": status, "param": None}}, status)

    async def refused(_: Any, error: Any) -> Any:
        return told(error.status_code, str(error.detail))

    async def unreadable(_: Any, error: Any) -> Any:
        return told(422, "the body of the request must be a JSON object.")

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, unreadable)


def _sentence(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


class _Loaded:
    """A model that stays, where transformers keeps those that it unloads after a while."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def reset_timer(self) -> None:
        """It has none."""


def _model_manager(model: Any, tokenizer: Any, name: str) -> Any:
    base: Any = importlib.import_module(f"{_SERVING}.model_manager").ModelManager

    class Held(base):
        """Knows one model, which it has not loaded and does not unload."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def load_model_and_processor(self, model_id_and_revision: str, *_: Any, **__: Any) -> tuple[Any, Any]:
            if model_id_and_revision != name:
                raise ValueError(f"this server has the model {name} alone, not {model_id_and_revision}.")
            return model, tokenizer

        def shutdown(self) -> None:
            """The model belongs to whoever started the server."""

        def list_models(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
            one = {"id": name, "object": "model", "created": 0, "owned_by": "local", "status": {"value": "loaded"}}
            return [one]

        get_gen_models = list_models  # what releases before 5.24 call it

    held = Held(device="cpu")
    held.force_model = name
    held.loaded_models[name] = _Loaded(model, tokenizer)
    return held


def _state(utils: Any, manager: Any) -> Any:
    class State(utils.GenerationState):
        """Every generation goes through one manager."""

        def use_continuous_batching(self, *_: Any, **__: Any) -> bool:
            return False

        def get_manager(self, *_: Any, **__: Any) -> Any:
            return manager

    return State()


def _manager(utils: Any, work: Work) -> Any:
    class Streamer(utils.DirectStreamer):
        """Text for one client; that it has gone reaches the work.

        Ids become text in the loop's thread. The one that runs the models hands over those of a round, and goes on.
        """

        job: Job | None = None

        def __init__(self, core: Any, calls: Gathered, queue: Any, response_parser: Any) -> None:
            super().__init__(core, ThisThread, queue, response_parser=response_parser)
            self.calls, self.queue, self.began, self.gone = calls, queue, False, False

        def put(self, value: Any) -> None:
            if self.began:
                self.calls.call_soon_threadsafe(self._told, super().put, value)
            else:
                self.began = True
                super().put(value)  # the prompt, which nobody is sent

        def end(self) -> None:
            self.calls.call_soon_threadsafe(self._told, super().end, last=True)

        def _told(self, call: Callable[..., None], *args: Any) -> None:
            """In the loop's thread."""
            if self.gone:
                return
            try:
                call(*args)
            except Exception as error:
                self.cancel()
                self.queue.put_nowait(_ending(error, utils._StreamError))

        def cancel(self) -> None:
            self.gone = True
            super().cancel()
            if self.job is not None:
                self.job.cancel()

    class Manager(utils.BaseGenerateManager):
        """Between transformers' handlers and our work."""

        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
        ) -> tuple[Any, Any]:
            loop, queue = asyncio.get_running_loop(), Texts()
            core = getattr(processor, "tokenizer", processor)._tokenizer
            calls = Gathered(loop)
            streamer = Streamer(core, calls, queue, response_parser)
            streamer.job = _submit(work, inputs, gen_config, processor, streamer)
            streamer.job.future.add_done_callback(lambda done: _tell(done, calls, queue, utils._StreamError))
            return queue, streamer

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
        ) -> tuple[str, int, Any]:
            job = _submit(work, inputs, gen_config, processor, None)
            try:
                ids = await asyncio.wrap_future(job.future)
            except asyncio.CancelledError:
                job.cancel()
                raise
            except Exception as error:
                raise GenerationFailed(error) from error
            return processor.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[-1], ids

        def stop(self) -> None:
            """Whoever made the work ends it."""

    return Manager()


def _submit(work: Work, inputs: Any, config: Any, processor: Any, streamer: Any) -> Job:
    seed = config.__dict__.pop("_request_seed", None)
    return work.submit(dict(inputs), config, seed, processor, streamer)


def _tell(done: Future[list[int]], loop: Gathered, queue: Any, stream_error: Callable[[str], Any]) -> None:
    """Ends a stream whose generation did not: the streamer's own `end` says so where all went well."""
    error = Cancelled() if done.cancelled() else done.exception()
    if error is None:
        return
    ending = None if isinstance(error, Cancelled) else _ending(error, stream_error)
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, ending, last=True)


def _ending(error: BaseException, stream_error: Callable[[str], Any]) -> Any:
    """What ends a stream that has failed; the handler puts the message between quotes as it is."""
    return stream_error(json.dumps(_sentence(error))[1:-1])
