# SPDX-License-Identifier: Apache-2.0
"""Presets: the paper's families, each a YAML file with target, head, middle, chat template and end tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..storage.reading import read_text, reading

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")
"""Where presets lie in an installed package and in a checkout."""


_KINDS: tuple[tuple[str, type, str], ...] = (
    ("model", str, "a name"),
    ("dtype", str, "a name"),
    ("assistants", dict, "names and what to load"),
    ("stop", list, "a list of tokens"),
    ("methods", list, "a list of methods"),
    ("max_new_tokens", int, "a whole number"),
)


@dataclass(frozen=True)
class Preset:
    """What a run of one family is made of.

    Attributes:
        title: the target's name in the paper's tables.
        model: hub id of the target.
        dtype: of everything that is not quantised.
        assistants: by name, what to load; the slowest first.
        stop: names of the tokens that end an answer.
        command: the one command that runs the paper's experiment.
        chat_template: Jinja text, or None for the tokenizer's own.
        system: system message, or None for none of its own.
        methods: as after `--methods`.
        max_new_tokens: most tokens of an answer.
        middle: the command that makes a better middle than the one made on loading, or None.
        notes: what to know before running it.
    """

    title: str
    model: str
    dtype: str
    assistants: dict[str, str]
    stop: list[str]
    command: str
    chat_template: str | None = None
    system: str | None = None
    methods: list[str] | None = None
    max_new_tokens: int = 1024
    middle: str | None = None
    notes: str = ""


def available() -> list[str]:
    """Names of the presets that come with the package."""
    names = {path.stem for folder in FOLDERS for path in folder.glob("*.yaml")}
    return sorted(names)


def load_preset(name: str) -> Preset:
    """A preset by name or file.

    Args:
        name: one of `available()`, or the path of a YAML file.

    Raises:
        ValueError: there is none, or the file is not one; the sentence says what is wrong.
    """
    import yaml

    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = next((folder / f"{name}.yaml" for folder in FOLDERS if (folder / f"{name}.yaml").is_file()), path)
    if not path.is_file():
        raise ValueError(f"There is no preset {name!r}; there are {', '.join(available())}, or name a YAML file.")
    remedy = "write the preset anew, as YAML in UTF-8"
    text = read_text(path, remedy)
    with reading(path, remedy):
        content: Any = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError(f"The preset {path} must be a YAML mapping.")
    known = {field.name: field for field in fields(Preset)}
    for key in content:
        if key not in known:
            raise ValueError(f"The preset {path} has the unknown key {key!r}; known are {', '.join(known)}.")
    for key in ("title", "model", "dtype", "assistants", "stop", "command"):
        if key not in content:
            raise ValueError(f"The preset {path} lacks {key!r}.")
    for key, kind, words in _KINDS:
        if content.get(key) is not None and not isinstance(content[key], kind):
            raise ValueError(f"The preset {path} must give {key} as {words}, not {content[key]!r}.")
    return Preset(**content)
