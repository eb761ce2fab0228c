# SPDX-License-Identifier: Apache-2.0
"""`--assistant auto` and `polyspec profile` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import save_pair
from typer.testing import CliRunner, Result

from hf_polyspec.auto import choosing
from hf_polyspec.auto.profile import Key
from hf_polyspec.cli import app, serve


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choosing._sides.clear()
    return str(save_pair(tmp_path)[0])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_generate_inspect_list_show_forget(folder: str) -> None:
    assert "There are no profiles in" in run("profile", "list").output
    answered = run("generate", "abcabc", "--model", folder, "--max-new-tokens", "8")
    assert answered.exit_code == 0, answered.output
    plain = run("generate", "abcabc", "--model", folder, "--assistant", "none", "--max-new-tokens", "8")
    assert answered.stdout == plain.stdout
    assert "auto: " in answered.stderr
    listed = run("profile", "list").output
    (name,) = re.findall(r"^ ?([0-9a-f]{16})", listed, re.MULTILINE)
    assert re.search(rf"{name} +target +float32 +cpu +1 ", listed)
    shown = json.loads(run("profile", "show", "target").stdout)
    assert shown["members"][-1] == "suffix"
    assert shown["key"]["threads"] == 1
    inspected = " ".join(run("inspect", folder).output.split())
    assert f"auto, float32 on cpu, packed if that pays, profile {name[:6]} {shown['line']}" in inspected
    assert run("profile", "forget", name[:5]).output == f"forgot {name}\n"
    assert "There are no profiles in" in run("profile", "list").output


def test_inspect_tells_profiles_apart_and_shows_those_of_here(folder: str, tmp_path: Path) -> None:
    short = ("generate", "abcabc", "--model", folder, "--max-new-tokens", "4")
    assert run(*short).exit_code == run(*short, "--pack").exit_code == 0
    (place,) = (tmp_path / "cache").glob("*/profiles")
    first, second = sorted(place.glob("*.json"))
    told = json.loads(first.read_text())
    for change in ({"threads": 99}, {"versions": "older"}, {"machine": "another"}, {"device": "warp9"}):
        key = Key(**told["key"] | change)
        (place / f"{key.name}.json").write_text(json.dumps(told | {"key": told["key"] | change}))
    labels = re.findall(r"^ *(auto, .*? profile \w{6}) ", run("inspect", folder).output, re.MULTILINE)
    assert sorted(label[-6:] for label in labels) == [first.stem[:6], second.stem[:6]]
    assert {label.split(", ")[2] for label in labels} == {"packed if that pays", "packed by you"}
    assert run("profile", "list").output.count(" target ") == 6


def test_a_damaged_profile_is_listed_and_can_be_forgotten(folder: str, tmp_path: Path) -> None:
    place = tmp_path / "cache" / "hf_polyspec" / "profiles"
    place.mkdir(parents=True)
    (place / "0123456789abcdef.json").write_text("{")
    assert "damaged: forget it" in run("profile", "list").output
    assert run("profile", "forget", "--all").output == "forgot 0123456789abcdef\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("profile", "show", "nothing"), "there is no profile 'nothing'"),
        (("profile", "forget", "nothing"), "there is no profile 'nothing'"),
        (("profile", "forget"), "or --all"),
        (("profile", "forget", "x", "--all"), "or --all"),
        (("generate", "a", "--assistant", "auto", "--assistant", "suffix"), "name no other beside it"),
        (("generate", "a", "--plan", "plan.json"), "name those that it was made for"),
        (("serve", "a", "--plan", "plan.json", "--assistant", "auto"), "name those that it was made for"),
    ],
)
def test_refusals_are_one_sentence(folder: str, words: tuple[str, ...], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert said in line


def test_serve_without_levels_leaves_the_choice_to_auto(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(serve, "ChainServer", lambda target, tokenizer, levels, **more: made.append(levels) or Quiet())
    result = run("serve", folder, "--port", "0")
    assert result.exit_code == 0, result.output
    assert made == [["auto"]]
    assert "with auto" in result.stderr


class Quiet:
    """A server that serves nobody."""

    def run(self) -> None:
        """Nobody asks."""


def test_demo_ends_with_auto(folder: str) -> None:
    short = ("--prompt", "abcabcabc", "--max-new-tokens", "12")
    result = run("demo", "--model", folder, "--assistant", "auto", *short)
    assert result.exit_code == 0, result.output
    assert "The 2 texts are identical" in result.output
    everything = run("demo", "--model", folder, *short)
    assert "The 4 texts are identical" in everything.output
    assert re.search(r"^ *auto .*x ", everything.output, re.MULTILINE)
