# SPDX-License-Identifier: Apache-2.0
"""Where the prompts of self-generated training texts come from: the user's file, or the target itself."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_polyspec.storage.reading import read_text

# stands in for the user's words while the chat template is taken apart
_MARK = "\u2402user words\u2402"


# a template's own words, and what it trips over in roles or texts it did not foresee
_REFUSALS = (TemplateError, TypeError, KeyError, IndexError, AttributeError)


class RefusedPromptError(ValueError):
    """A chat template does not take a conversation; the message holds the template's words."""


@dataclass(frozen=True)
class ChatFrame:
    """A chat template cut open where the user speaks.

    Args:
        header: ids up to the user's first word.
        closing: the id that ends the user's turn, or None for a tokenizer without a chat template.
    """

    header: tuple[int, ...]
    closing: int | None


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> ChatFrame:
    """Finds what stands before and after the user's words.

    Args:
        tokenizer: the target's tokenizer. Without a chat template the frame is the begin-of-text id alone, and the
            target's own continuation of it is the training text.

    Raises:
        ValueError: the tokenizer has neither a chat template nor a begin- or end-of-text id.
    """
    if not tokenizer.chat_template:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(
                "the tokenizer has no chat template and no begin-of-text id, so the target cannot invent prompts; "
                "give a file of prompts"
            )
        return ChatFrame((int(cast(int, start)),), None)
    try:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    except _REFUSALS as error:
        raise ValueError(
            f"the chat template takes no words of a user alone ({' '.join(str(error).split())}), so prompts must come "
            "from a file"
        ) from error
    before, _, after = str(rendered).partition(_MARK)
    closing = tokenizer.encode(after, add_special_tokens=False)
    if not closing:
        raise ValueError("the chat template does not end the user's turn, so prompts must come from a file")
    return ChatFrame(tuple(tokenizer.encode(before, add_special_tokens=False)), int(closing[0]))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]]) -> list[int]:
    """Renders a conversation up to where the target answers.

    Args:
        tokenizer: the target's tokenizer; without a chat template the turns' contents are joined by newlines.
        turns: messages with `role` and `content`, the last one not the assistant's.

    Raises:
        RefusedPromptError: the chat template does not take such a conversation.
    """
    if not tokenizer.chat_template:
        text = "\n".join(turn["content"] for turn in turns)
        return [int(i) for i in tokenizer.encode(text)]
    try:
        text = str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))
    except _REFUSALS as error:
        raise RefusedPromptError(f"the chat template refuses it ({' '.join(str(error).split())})") from error
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Reads a user's prompts.

    Args:
        path: a `.txt` file with a prompt a line, or a `.jsonl`/`.json` file of strings or objects that have one of
            `messages`, `conversations`, `turns` (the first is used), `prompt`, `instruction`, `question` or `text`.

    Returns:
        One conversation a prompt, each a list of `{"role", "content"}`.

    Raises:
        ValueError: the file is missing, empty or no JSON, or an entry holds no prompt.
    """
    return [_conversation(row, number, path) for number, row in enumerate(_entries(path), start=1)]


def _entries(path: Path) -> list[Any]:
    """What a file of prompts lists, not yet looked into."""
    if not path.is_file():
        raise ValueError(f"there is no file of prompts at {path}")
    text = read_text(path, "write it anew, in UTF-8")
    if path.suffix == ".json":
        rows = _parsed(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a list of prompts, not {type(rows).__name__}")
    else:
        # JSON strings may hold the other line separators of Unicode, at which splitlines would cut them
        rows = [line for line in enumerate(text.split("\n"), start=1) if line[1].strip()]
        read = path.suffix == ".jsonl"
        rows = [_parsed(line, f"line {number} of {path}") if read else line for number, line in rows]
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    return list(rows)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg})") from None


def _conversation(row: Any, number: int, path: Path) -> list[dict[str, str]]:
    if isinstance(row, str) and row.strip():
        return [{"role": "user", "content": row}]
    if isinstance(row, dict):
        for key in ("messages", "conversations"):
            if isinstance(row.get(key), list) and row[key]:
                return _until_answer(row[key], number, path)
        turns = row.get("turns")
        if isinstance(turns, list) and turns and isinstance(turns[0], str) and turns[0].strip():
            return [{"role": "user", "content": turns[0]}]
        for key in ("prompt", "instruction", "question", "text"):
            if isinstance(row.get(key), str) and row[key].strip():
                return [{"role": "user", "content": row[key]}]
    raise ValueError(f"entry {number} of {path} holds no prompt that could be read")


def _until_answer(messages: Sequence[Any], number: int, path: Path) -> list[dict[str, str]]:
    """The turns before the last answer of the assistant; ShareGPT's `from`/`value` names are understood."""
    if not all(isinstance(m, dict) and isinstance(m.get("content", m.get("value", "")), str) for m in messages):
        raise ValueError(f"entry {number} of {path} holds a message that is no role with a text")
    names = {"human": "user", "gpt": "assistant"}
    turns = [
        {
            "role": names.get(m.get("role", m.get("from", "user")), m.get("role", m.get("from", "user"))),
            "content": m.get("content", m.get("value", "")),
        }
        for m in messages
    ]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns:
        raise ValueError(f"entry {number} of {path} holds only answers")
    return turns


@dataclass
class PromptFilter:
    """Decides which invented prompts are worth an answer.

    Args:
        min_words: fewest words.
        max_tokens: most ids.
        ascii_ratio: smallest share of ASCII characters; 0 accepts every script.
        excluded: normalised prompts that must not be used, for example those of a benchmark.
    """

    min_words: int = 3
    max_tokens: int = 192
    ascii_ratio: float = 0.9
    excluded: frozenset[str] = frozenset()
    seen: set[str] = field(default_factory=set)

    def accepts(self, text: str, length: int) -> bool:
        """Whether a prompt passes, and remembers it so that it passes only once.

        Args:
            text: the prompt.
            length: its ids.
        """
        words = normalise(text)
        if length > self.max_tokens or len(words.split()) < self.min_words:
            return False
        if sum(char.isascii() for char in text) < self.ascii_ratio * len(text):
            return False
        if words in self.excluded or words in self.seen:
            return False
        self.seen.add(words)
        return True


def normalise(text: str) -> str:
    """Lower case, single spaces: what counts as the same prompt.

    Args:
        text: a prompt.
    """
    return " ".join(text.lower().split())


def whole_sentences(text: str) -> str:
    """A text without the unfinished sentence at its end; nothing where no sentence ends.

    Args:
        text: a prompt that was cut off.
    """
    end = max(text.rfind(mark) for mark in (". ", "? ", "! ", ".\n", "?\n", "!\n", "\n\n"))
    return text[: end + 1].strip()


def read_excluded(path: Path | None) -> frozenset[str]:
    """The normalised prompts of a file that must not be trained on, every turn of every entry.

    Args:
        path: a file as for `read_prompts`, or None.

    Raises:
        ValueError: as for `read_prompts`.
    """
    if path is None:
        return frozenset()
    found: set[str] = set()
    for number, row in enumerate(_entries(path), start=1):
        found.update(asked(_conversation(row, number, path)))
        if isinstance(row, dict):
            found.update(normalise(turn) for turn in row.get("turns") or [] if isinstance(turn, str))
    return frozenset(found)


def asked(turns: Sequence[dict[str, str]]) -> set[str]:
    """The normalised words of everybody in a conversation but the system, whose words many conversations share.

    Args:
        turns: messages with `role` and `content`.
    """
    return {normalise(turn["content"]) for turn in turns if turn["role"] != "system"}


def sample_random(seed: int, number: int, stage: str) -> random.Random:
    """The random numbers of one sample, the same whenever and wherever it is made.

    Args:
        seed: the run's seed.
        number: the sample's number.
        stage: what they are drawn for.
    """
    # a string seed is hashed with SHA-512 by random.Random, hence the same on every machine
    return random.Random(f"{seed}/{number}/{stage}")
