# SPDX-License-Identifier: Apache-2.0
"""Profiles: what was measured of a model on a machine and what was chosen, one JSON file each in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..control.costs import Head
from ..cpu.compiled import compiles
from ..errors import DamagedFileError
from ..host.release import installed
from ..models.environment import processor
from ..models.packaged import cache_root
from ..storage.atomic import write_json
from ..storage.reading import read_json
from ..version import __version__

FORMAT = 4
REMEDY = "forget it with `polyspec profile forget`; the next call measures anew"


@dataclass(frozen=True)
class Key:
    """What a profile holds for; any other value of any of these is another profile.

    Attributes:
        weights: see `source.identity_of`; dtype, device: of the model; pack: whether packing is allowed.
        layout: see `source.layout_of`.
        machine: processor; threads: of torch; versions: of this package and of what computes.
    """

    weights: str
    dtype: str
    device: str
    pack: bool
    layout: str
    machine: str
    threads: int
    versions: str

    @classmethod
    def here(cls, weights: str, dtype: torch.dtype, device: torch.device, pack: bool, layout: str) -> Key:
        """The key on this machine, now."""
        kind = str(dtype).removeprefix("torch.")
        return cls(weights, kind, device.type, pack, layout, *_surroundings(device))

    @property
    def holds_here(self) -> bool:
        """Whether it is of this machine as it is now, and of the versions that are installed."""
        try:
            here = _surroundings(torch.device(self.device))
        except (RuntimeError, AssertionError):  # a device that is not there
            return False
        return (self.machine, self.threads, self.versions) == here

    @property
    def name(self) -> str:
        """Of the file: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def _surroundings(device: torch.device) -> tuple[str, int, str]:
    """Processor, threads and versions."""
    name = processor() if device.type == "cpu" else _accelerator(device)
    numba = "numba" if compiles() else "no numba"
    versions = f"hf_polyspec {__version__}, torch {torch.__version__}, transformers {installed()}, {numba}"
    return name, torch.get_num_threads(), f"{versions}, Python {platform.python_version()}"


def _accelerator(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class Profile:
    """What "auto" knows of a model on a machine.

    Attributes:
        key: what it holds for; model: its name, for messages; date: of the measurement.
        packed: whether the target is run packed; members: names of the levels below, the slowest first.
        options: sizes, as `generate()` takes them.
        passes: by level, [columns, seconds] of passes, of a drafter those of drafts; "target" is the chosen one,
            "unpacked" the other.
        agreement: by member, the share of tokens in which it said what the target said.
        scales: by copy, the scale of its errors in logits (`control.leads`).
        line: what was chosen and why; left_out: sentences on what was not.
        seconds: that measuring took.
    """

    key: Key
    model: str
    date: str
    packed: bool
    members: tuple[str, ...]
    options: dict[str, int]
    passes: dict[str, list[list[float]]]
    agreement: dict[str, float]
    scales: dict[str, float]
    line: str
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0
    format: int = FORMAT

    def head_of(self, name: str) -> Head:
        """Of a member that drafts token by token."""
        return head_of(self.agreement[name], self.passes[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-serialisable."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        """The profile of `to_dict`.

        Raises:
            ValueError: it has not the form of one.
        """
        names = {one.name for one in fields(cls)}
        if set(values) != names or values.get("format") != FORMAT:
            raise ValueError(f"it is no profile of format {FORMAT}")
        try:
            given = {**values, "key": Key(**values["key"])}
            given["members"], given["left_out"] = tuple(values["members"]), tuple(values["left_out"])
            points = [point for level in values["passes"].values() for point in level]
            good = all(float(columns) > 0 and 0 < float(seconds) < float("inf") for columns, seconds in points)
            named = all(isinstance(name, str) for name in (*given["members"], *given["left_out"], given["line"]))
            sizes = all(isinstance(size, int) and size >= 0 for size in values["options"].values())
            shares = all(0 <= float(share) <= 1 for share in values["agreement"].values())
            shares = shares and all(0 < float(scale) < float("inf") for scale in values["scales"].values())
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError("it has not the form of a profile") from error
        if not (good and named and sizes and shares and values["passes"].get("target")):
            raise ValueError("it holds values that no profile has")
        return cls(**given)


def head_of(share: float, drafts: Sequence[Sequence[float]]) -> Head:
    """What is known of a head, from seconds of drafts of one token and of two (`drafts_of`)."""
    one, two = drafts[0][1], drafts[1][1]
    return Head(share, two - one, max(0.0, 2 * one - two))


def drafts_of(head: Head) -> list[list[float]]:
    """[tokens, seconds] of drafts of one token and of two."""
    return [[tokens, head.extra + tokens * head.step] for tokens in (1, 2)]


def folder() -> Path:
    """Where profiles are kept."""
    return cache_root() / "profiles"


def path_of(key: Key) -> Path:
    """The file of a profile."""
    return folder() / f"{key.name}.json"


def read(path: Path) -> Profile:
    """A profile from its file.

    Raises:
        DamagedFileError: there is none in it; OSError: it cannot be read.
    """
    try:
        return Profile.from_dict(read_json(path, remedy=REMEDY))
    except DamagedFileError:
        raise
    except ValueError as error:
        raise DamagedFileError(path, str(error), REMEDY) from error


def load(key: Key) -> Profile | None:
    """The profile of a key; None where there is none, or none that can be read."""
    try:
        found = read(path_of(key))
    except (OSError, DamagedFileError):
        return None
    return found if found.key == key else None


def save(profile: Profile) -> None:
    """Keep a profile, whole or not at all. Raises OSError."""
    write_json(path_of(profile.key), profile.to_dict())


def kept() -> Iterator[tuple[Path, Profile | None]]:
    """All files of profiles, the newest first, with None for one that cannot be read."""
    files = sorted(folder().glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        try:
            yield path, read(path)
        except (OSError, DamagedFileError):
            yield path, None


def forget(name: str | None = None) -> list[Path]:
    """Delete profiles: the one of this name or beginning of a name, of this model, or all.

    Returns:
        The files that were deleted.
    """
    found = []
    for path, profile in list(kept()):
        model = "" if profile is None else profile.model
        if name is None or path.stem.startswith(name) or model == name:
            os.unlink(path)
            found.append(path)
    return found
