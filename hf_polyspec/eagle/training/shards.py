# SPDX-License-Identifier: Apache-2.0
"""Self-generated texts on disk: small shards, each complete or absent.

A shard is one safetensors file. It appears under its final name only when whole, so a killed run leaves either a
sample with everything that belongs to it or no trace of it, and the sample is then written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from hf_polyspec.eagle.training.kept_states import Seen, save_seen
from hf_polyspec.storage.atomic import write_tensors
from hf_polyspec.storage.reading import reading

GREEDY = 0
SAMPLED = 1


@dataclass(frozen=True)
class Sample:
    """One text: a prompt and the answer the target gave to it.

    Args:
        number: the sample's number in its run; it fixes the random numbers that made it.
        tokens: all ids, prompt and answer, end-of-text id included.
        prompt_length: how many of the ids are prompt.
        kind: `GREEDY` or `SAMPLED`.
        seen: what the model computed while it wrote, where that is kept.
    """

    number: int
    tokens: tuple[int, ...]
    prompt_length: int
    kind: int
    seen: Seen | None = field(default=None, compare=False, repr=False)

    @property
    def answer_length(self) -> int:
        """How many of the ids the target wrote as its answer."""
        return len(self.tokens) - self.prompt_length


class ShardWriter:
    """Collects samples and writes them out whole.

    Args:
        folder: where the shards go; created when absent.
        rank: number of the writing process, part of the file names.
        vocab_size: decides how many bytes an id takes.
        provenance: short facts about the run, kept in each shard's header.
        whose_states: the `identity` of the states that samples come with, if they do.
    """

    def __init__(
        self, folder: Path, rank: int, vocab_size: int, provenance: dict[str, str], whose_states: str = ""
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rank = rank
        self.dtype: npt.DTypeLike = np.uint16 if vocab_size <= 2**16 else np.uint32
        self.provenance = provenance
        self.whose_states = whose_states
        self.samples: list[Sample] = []
        self.rejected: list[int] = []
        self.next_index = 1 + max((_index(path) for path in folder.glob(f"shard-{rank:03d}-*")), default=-1)

    @property
    def waiting_tokens(self) -> int:
        """Tokens collected and not yet on disk."""
        return sum(len(sample.tokens) for sample in self.samples)

    def add(self, sample: Sample) -> None:
        """Takes one finished sample."""
        self.samples.append(sample)

    def reject(self, number: int) -> None:
        """Notes that a sample was tried and filtered out, so that it is not tried again."""
        self.rejected.append(number)

    def flush(self) -> Path | None:
        """Writes everything collected as one shard.

        Returns:
            The new file, or None when there was nothing to write.
        """
        if not self.samples and not self.rejected:
            return None
        path = self.folder / f"shard-{self.rank:03d}-{self.next_index:05d}.safetensors"
        lengths = [len(sample.tokens) for sample in self.samples]
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "tokens": np.array([i for sample in self.samples for i in sample.tokens], dtype=self.dtype),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "prompt_lengths": np.array([sample.prompt_length for sample in self.samples], dtype=np.int32),
            "numbers": np.array([sample.number for sample in self.samples], dtype=np.int64),
            "kinds": np.array([sample.kind for sample in self.samples], dtype=np.uint8),
            "rejected": np.array(self.rejected, dtype=np.int64),
        }
        seen = [(sample.number, sample.seen) for sample in self.samples if sample.seen is not None]
        if seen:
            save_seen(path, seen, self.whose_states)
        write_tensors(path, tensors, {"provenance": json.dumps(self.provenance)})
        self.samples, self.rejected = [], []
        self.next_index += 1
        return path


@dataclass(frozen=True)
class Progress:
    """What a folder of shards already holds.

    Args:
        numbers: samples written or filtered out.
        samples: how many were written.
        tokens: ids in them.
        answer_tokens: ids of them that are answers.
    """

    numbers: frozenset[int]
    samples: int
    tokens: int
    answer_tokens: int


def read_samples(folder: Path) -> Iterator[Sample]:
    """Reads every sample of a folder once, ordered by its number.

    Args:
        folder: a folder of shards.

    Raises:
        ValueError: the folder holds no shard.
    """
    samples: dict[int, Sample] = {}
    paths = sorted(folder.glob("shard-*.safetensors"))
    if not paths:
        raise ValueError(f"there are no generated texts in {folder}")
    for path in paths:
        for sample in read_shard(path):
            # processes of an earlier run may have shared the numbers out differently
            samples.setdefault(sample.number, sample)
    for number in sorted(samples):
        yield samples[number]


def read_shard(path: Path) -> Iterator[Sample]:
    """Reads the samples of one shard.

    Args:
        path: a shard's file.
    """
    with _opened(path) as handle:
        tokens = handle.get_tensor("tokens")
        offsets = handle.get_tensor("offsets")
        prompts = handle.get_tensor("prompt_lengths")
        numbers = handle.get_tensor("numbers")
        kinds = handle.get_tensor("kinds")
    for i, number in enumerate(numbers):
        ids = tuple(int(token) for token in tokens[offsets[i] : offsets[i + 1]])
        yield Sample(int(number), ids, int(prompts[i]), int(kinds[i]))


def read_provenance(folder: Path) -> list[dict[str, str]]:
    """The facts that the shards of a folder carry, each distinct set once.

    Args:
        folder: a folder of shards.
    """
    found: list[dict[str, str]] = []
    for path in sorted(folder.glob("shard-*.safetensors")):
        with _opened(path) as handle:
            facts = json.loads(handle.metadata()["provenance"])
        if facts not in found:
            found.append(facts)
    return found


def read_progress(folder: Path) -> Progress:
    """Counts what a folder already holds.

    Args:
        folder: a folder of shards; it may be empty or absent.
    """
    numbers: set[int] = set()
    samples = tokens = answers = 0
    for path in sorted(folder.glob("shard-*.safetensors")):
        with _opened(path) as handle:
            fresh = [int(n) for n in handle.get_tensor("numbers") if int(n) not in numbers]
            numbers.update(fresh)
            numbers.update(int(n) for n in handle.get_tensor("rejected"))
            samples += len(fresh)
            length = int(handle.get_tensor("offsets")[-1])
            tokens += length
            answers += length - int(handle.get_tensor("prompt_lengths").sum())
    return Progress(frozenset(numbers), samples, tokens, answers)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard to read from.

    Raises:
        DamagedFileError: it, or what is asked of it, cannot be read; the sentence names it.
    """
    remedy = "delete it and have its texts written again by the same command, or restore it if training has begun"
    with reading(path, remedy), safe_open(path, framework="numpy") as handle:
        yield handle


def _index(path: Path) -> int:
    return int(path.stem.split("-")[2])
