# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client in a process of its own, which asks a server what it is told to: one line of JSON in, one out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any


class Client:
    """That process, until the end of a with."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, url: str, name: str, prompts: Sequence[str], new_tokens: int, stream: bool) -> dict[str, Any]:
        """Ask one thing after the other.

        Args:
            url: of the server; name: of its model; prompts: what a user says.
            new_tokens: at most; stream: whether answers are streamed.

        Returns:
            `texts`, the `seconds` that all of them took, and of streams the seconds until the `first` text of each.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told = {"url": url, "name": name, "prompts": list(prompts), "new_tokens": new_tokens, "stream": stream}
        print(json.dumps(told), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the client's process ended with {self._process.wait()}.")
        found: dict[str, Any] = json.loads(answer)
        return found

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # which closes its input, and so ends it


def answered(url: str, name: str, prompts: Sequence[str], new_tokens: int, stream: bool) -> dict[str, Any]:
    """What `Client.ask` returns, asked in this process."""
    import openai

    texts: list[str] = []
    first: list[float] = []
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        client.models.list()  # the connection is there before anything is timed
        began = time.perf_counter()
        for text in prompts:
            each = time.perf_counter()
            asked: Any = {"model": name, "messages": [{"role": "user", "content": text}], "temperature": 0}
            answer: Any = client.chat.completions.create(**asked, max_tokens=new_tokens, stream=stream)
            if not stream:
                texts.append(answer.choices[0].message.content or "")
                continue
            parts: list[str] = []
            for part in answer:
                if part.choices[0].delta.content:
                    first += [] if parts else [time.perf_counter() - each]
                    parts.append(part.choices[0].delta.content)
            texts.append("".join(parts))
        seconds = time.perf_counter() - began
    return {"texts": texts, "seconds": seconds, "first": first}


def _serve() -> None:
    """Answer until nothing more is asked."""
    for line in sys.stdin:
        print(json.dumps(answered(**json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
