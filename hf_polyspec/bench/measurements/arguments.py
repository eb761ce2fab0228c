# SPDX-License-Identifier: Apache-2.0
"""What the commands of this room have in common: kinds of arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import DamagedFileError
from ...models.assistants import check_level_name
from ...models.by_name import check_device
from ...storage.reading import read_text


def count(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        ArgumentTypeError: it is none; argparse says which argument.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}.")
    return int(text)


def count_or_none(text: str) -> int:
    """A whole number, 0 for none.

    Raises:
        ArgumentTypeError: it is no whole number, or below 0.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 for none, got {text!r}.")
    return int(text)


def level(text: str) -> str:
    """The name of a level, as `load_assistant` takes it.

    Raises:
        ArgumentTypeError: it stands for a choice of levels.
    """
    try:
        return check_level_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def device(text: str) -> str:
    """A device that is there.

    Raises:
        ArgumentTypeError: it is not.
    """
    try:
        check_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def rows(text: str) -> int | str:
    """A size of a draft vocabulary: a number, or "auto".

    Raises:
        ArgumentTypeError: it is neither.
    """
    return text if text == "auto" else count(text)


def lines(text: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        ArgumentTypeError: there is no such file, or nothing in it.
    """
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}.")
    try:
        content = read_text(path, "save it as UTF-8")
    except DamagedFileError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    found = [line for line in content.splitlines() if line.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text} holds no lines.")
    return found
