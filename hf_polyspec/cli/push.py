# SPDX-License-Identifier: Apache-2.0
"""`polyspec push`: a head, a quantised copy, a recipe for generate() or one for training as a repository of the Hub."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

from hf_polyspec.models.packaged import HEAD, head_folder
from hf_polyspec.storage.reading import read_json

_LEFT = ("__pycache__", ".git", ".cache", "unfinished")
"""Folders that are nobody else's business."""


def push_command(
    folder: Annotated[str, typer.Argument(help="What to push: a folder, or smollm2-eagle3.")],
    repository: Annotated[str, typer.Argument(help="Where to: OWNER/NAME.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it, and show every file.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A new repository is for its owner alone.")] = False,
) -> None:
    """Push a folder to the Hub, after a look at whether it is a whole repository of its kind."""
    source = head_folder() if folder == HEAD else Path(folder).expanduser()
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"the repository must be OWNER/NAME, got {repository!r}.") from error
    if not source.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    kind, missing = look_at(source)
    files = files_of(source)
    typer.echo(f"{source} is {kind}; {len(files)} files for https://huggingface.co/{repository}:")
    for path in files:
        typer.echo(f"  {path.relative_to(source).as_posix():44} {path.stat().st_size / 1000:12,.1f} kB")
    if missing:
        raise ValueError(f"{source} is not a whole repository: {'; '.join(missing)}.")
    if dry_run:
        typer.echo("nothing was pushed (--dry-run)")
        return
    hub = HfApi()
    hub.create_repo(repository, private=private or None, exist_ok=True)
    hub.upload_folder(
        repo_id=repository,
        folder_path=source,
        ignore_patterns=[f"{part}{name}/**" for name in _LEFT for part in ("", "**/")],
        commit_message="polyspec push",
    )
    typer.echo("pushed")


def files_of(folder: Path) -> list[Path]:
    """Every file that is pushed, by name."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not set(path.relative_to(folder).parts) & set(_LEFT))


def look_at(folder: Path) -> tuple[str, list[str]]:
    """What a folder is, and what it lacks to be a whole repository.

    Returns:
        The kind in words, and a clause for everything that is missing.

    Raises:
        ValueError: it is of no kind that is known.
        DamagedFileError: its config.json cannot be read.
    """
    if (folder / "custom_generate").is_dir():
        kind, wanted = "a recipe for generate()", ["custom_generate/generate.py", "custom_generate/requirements.txt"]
    elif (folder / "config.json").is_file():
        config = read_json(folder / "config.json", remedy="save it again")
        head = "eagle" in str(config.get("model_type", "")).lower()
        kind, wanted = ("an EAGLE head" if head else "a model"), []
    elif any(folder.glob("*.yaml")):
        kind, wanted = "a recipe for training", _named(folder)
    else:
        raise ValueError(
            f"{folder} is neither a head or model (no config.json), nor a recipe for generate() (no custom_generate) "
            "or for training (no .yaml)."
        )
    missing = [f"{name} is not there" for name in wanted if not (folder / name).is_file()]
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        missing.append("there are no weights (.safetensors)")
    return kind, missing + _card(folder, kind)


def _card(folder: Path, kind: str) -> list[str]:
    """What a README.md does not tell the Hub: a head's model, a recipe's licence, and the tag that finds recipes."""
    page = folder / "README.md"
    if not page.is_file():
        return ["README.md is not there"]
    told = metadata_load(page) or {}
    wanted = "license" if kind.startswith("a recipe") else "base_model" if kind == "an EAGLE head" else None
    missing = [f"README.md names no {wanted} in its header"] if wanted and not told.get(wanted) else []
    if (folder / "custom_generate").is_dir() and "custom_generate" not in (told.get("tags") or []):
        missing.append("README.md lacks the tag custom_generate, by which such recipes are found")
    return missing


def _named(folder: Path) -> list[str]:
    """Configs and scripts that the commands of a README.md are called with."""
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            found += [b for a, b in pairwise(words) if a in ("python", "--config", "--forms")]
    return sorted({name for name in found if not name.startswith("-")})
