# SPDX-License-Identifier: Apache-2.0
"""One client of a server, in a process of its own: `python -m hf_polyspec.bench.measurements.server_client PORT NAME`.

Reads requests from its input, a line of JSON each, and writes the seconds they took and their texts.
"""

from __future__ import annotations

import json
import sys
import time

import openai


def answer() -> None:
    """Until the input ends."""
    port, name = sys.argv[1:]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        for line in sys.stdin:
            asked = json.loads(line)
            began = time.perf_counter()
            texts = [_text(client, name, prompt, asked["new_tokens"], asked["stream"]) for prompt in asked["prompts"]]
            seconds = time.perf_counter() - began
            print(json.dumps({"seconds": seconds, "texts": texts}), flush=True)


def _text(client: openai.OpenAI, name: str, prompt: str, new_tokens: int, stream: bool) -> str:
    door = client.chat.completions
    if not stream:
        answer = door.create(
            model=name, messages=[{"role": "user", "content": prompt}], max_tokens=new_tokens, temperature=0
        )  # fmt: skip
        return answer.choices[0].message.content or ""
    parts = door.create(
        model=name, messages=[{"role": "user", "content": prompt}], max_tokens=new_tokens, temperature=0, stream=True
    )  # fmt: skip
    return "".join(part.choices[0].delta.content or "" for part in parts)


if __name__ == "__main__":
    answer()
