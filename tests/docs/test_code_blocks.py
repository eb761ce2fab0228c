# SPDX-License-Identifier: Apache-2.0
"""The pages say what is so: their Python runs, their commands exist with the options they show, the site builds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from page_lines import PAGES, ROOT, blocks, indented, lines
from tiny_checkpoints import byte_tokenizer
from tiny_models import noisy, tiny
from transformers import PreTrainedModel
from typer.testing import CliRunner

import hf_polyspec
from hf_polyspec.cli import app
from hf_polyspec.eagle.fresh import init_for
from hf_polyspec.eagle.training.config import build_config


def pages_with(language: str) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


@pytest.fixture
def names(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What every page may take for granted: a model, its tokenizer, a prompt, assistants, a head's folder."""
    tokenizer = byte_tokenizer()
    model: PreTrainedModel = tiny("llama", seed=5, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.generation_config.eos_token_id = None
    inputs = tokenizer("one two one two one", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    head = init_for(model, "eagle3", list(range(0, len(tokenizer), 2)))
    for folder in ("head", "my-head"):
        head.save_pretrained(str(tmp_path / folder))
    ids = inputs["input_ids"][0].tolist()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield {
            "hf_polyspec": hf_polyspec,
            "torch": torch,
            "model": model,
            "target": model,
            "tokenizer": tokenizer,
            "inputs": dict(inputs),
            "middle": hf_polyspec.quantize_model(model, bits=8),
            "head": head.eval(),
            "small": noisy(model),
            "prompts": [ids, ids[::-1]],
            "answers": [ids, ids[3:]],
            "head_folder": str(tmp_path / "head"),
            "scratch": tmp_path,
        }
    hf_polyspec.disable()


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(names["scratch"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(names["scratch"] / "cache"))
    for number, source in enumerate(blocks(page, "python"), start=1):
        exec(compile(source, f"{page.name}, block {number}", "exec"), names)


def commands(page: Path) -> list[list[str]]:
    """Every `polyspec` command of a page's shell blocks, its continuation lines joined."""
    found = []
    shell = blocks(page, "bash") + [code for code in indented(page) if code.lstrip().startswith("polyspec")]
    for block in shell:
        for words in lines(block):
            for start in ("polyspec", "hf_polyspec"):
                if start in words:
                    found.append(words[words.index(start) + 1 :])
                    break
    return found


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES if commands(page)])
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        name, *rest = words
        # Some commands parse their own words, so the help is the one place where all options are known; `measure` has
        # one for each measurement.
        asked = [name, *takewhile(lambda word: not word.startswith("-"), rest)]
        told = CliRunner().invoke(app, [*asked, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
        assert told.exit_code == 0, f"{page.name}: no such command: {' '.join(asked)}"
        options = set(re.findall(r"--[a-z0-9-]+", told.output))
        shown = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert shown <= options, f"{page.name}: {name} has no {shown - options}"


def test_the_config_file_is_a_config() -> None:
    [source] = blocks(ROOT / "docs" / "training.md", "yaml")
    assert build_config(yaml.safe_load(source)).optimization.epochs == 4


def test_every_option_is_explained() -> None:
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    missing = [name for name in hf_polyspec.PolySpecOptions.names() if f"`{name}`" not in page]
    assert not missing


def test_the_site_is_whole(site: Path) -> None:
    pages = list(site.rglob("index.html"))
    assert len(pages) >= len(PAGES) - 1
    reference = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("hf_polyspec.generate", "hf_polyspec.SuffixDrafter", "hf_polyspec.eagle.EagleHead"):
        assert f'id="{name}"' in reference
