# SPDX-License-Identifier: Apache-2.0
"""`polyspec push`: what is a whole repository, and what would be pushed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_polyspec.cli import app, push

RECIPES = Path(__file__).parents[3] / "recipes"


def polyspec(*words: object) -> Any:
    return CliRunner().invoke(app, ["push", *map(str, words)], env={"COLUMNS": "300"})


@pytest.mark.parametrize(
    ("source", "kind", "names"),
    [
        ("smollm2-eagle3", "an EAGLE head", ["README.md", "config.json", "model.safetensors", "training.yaml"]),
        (
            RECIPES / "custom_generate",
            "a recipe for generate()",
            ["README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"],
        ),
        (
            RECIPES / "smollm2-eagle3",
            "a recipe for training",
            ["README.md", "average_heads.py", "make_prompts.py", "make_requests.py", "stage-13.yaml"],
        ),
    ],
)
def test_a_dry_run_shows_every_file_and_pushes_none(
    source: object, kind: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "HfApi", lambda: pytest.fail("the hub was asked"))
    done = polyspec(source, "me/mine", "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"is {kind}; " in done.output
    assert "https://huggingface.co/me/mine" in done.output
    shown = [line.split()[0] for line in done.output.splitlines() if line.startswith("  ")]
    assert set(names) <= set(shown)
    folder = push.head_folder() if isinstance(source, str) else Path(str(source))
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(shown) == {name for name in there if "__pycache__" not in name}
    assert "nothing was pushed" in done.output


@pytest.mark.parametrize(
    ("source", "gone", "said"),
    [
        ("custom_generate", "custom_generate/generate.py", "custom_generate/generate.py is not there"),
        ("custom_generate", "README.md", "README.md is not there"),
        ("smollm2-eagle3", "stage-4.yaml", "stage-4.yaml is not there"),
        ("smollm2-eagle3", "average_heads.py", "average_heads.py is not there"),
    ],
)
def test_what_is_missing_is_named_and_nothing_pushed(
    source: str, gone: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "HfApi", lambda: pytest.fail("the hub was asked"))
    folder = tmp_path / source
    shutil.copytree(RECIPES / source, folder)
    (folder / gone).unlink()
    done = polyspec(folder, "me/mine")
    assert done.exit_code == 2
    assert said in done.stderr


def test_headers_are_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    shutil.copytree(RECIPES / "custom_generate", folder)
    (folder / "README.md").write_text("# nothing\n")
    done = polyspec(folder, "me/mine", "--dry-run")
    assert "names no license" in done.stderr
    assert "lacks the tag custom_generate" in done.stderr


def test_what_is_whole_is_pushed_without_what_is_nobodys_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "recipe"
    shutil.copytree(RECIPES / "custom_generate", folder)
    (folder / "custom_generate" / "__pycache__").mkdir(exist_ok=True)
    (folder / "custom_generate" / "__pycache__" / "generate.pyc").write_bytes(b"x")
    asked: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, *words: Any, **named: Any) -> None:
            asked.append(("create", (words, named)))

        def upload_folder(self, **named: Any) -> None:
            asked.append(("upload", named))

    monkeypatch.setattr(push, "HfApi", Hub)
    done = polyspec(folder, "me/mine", "--private")
    assert done.exit_code == 0, done.output
    assert "__pycache__" not in done.output
    assert asked[0] == ("create", (("me/mine",), {"private": True, "exist_ok": True}))
    assert asked[1][1]["folder_path"] == folder
    assert "**/__pycache__/**" in asked[1][1]["ignore_patterns"]


def test_folders_of_no_kind_and_names_that_are_none_are_refused(tmp_path: Path) -> None:
    assert "is neither a head or model" in polyspec(tmp_path, "me/mine").stderr
    assert "There is no folder" in polyspec(tmp_path / "none", "me/mine").stderr
    assert "must be OWNER/NAME" in polyspec(tmp_path, "me/mine/more").stderr
