# SPDX-License-Identifier: Apache-2.0
"""What must hold of the package's files whatever happens to the process that writes them.

Each workload makes a state (`prepare`), changes it (`call`), and says whether what is left is one of the states that
are promised (`check`): as it was, or as it was to become, and writable again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_polyspec.bench.journal import Journal, read_lines, write_settings
from hf_polyspec.errors import DamagedFileError
from hf_polyspec.integers.weights import QuantizedWeight, round_to_nearest
from hf_polyspec.quantization.store import LayerStore
from hf_polyspec.storage import atomic, folders, lines, locks, reading

from .torn import check_told, damaged


@dataclass(frozen=True)
class Workload:
    """One thing that is written.

    Attributes:
        prepare: makes the state anew; call: changes it.
        check: raises where what is left is not promised; True where the change was made.
    """

    prepare: Callable[[], Any]
    call: Callable[[], Any]
    check: Callable[[], bool]


def workloads(place: Path) -> dict[str, Workload]:
    """All of them by name.

    Args:
        place: a folder of their own.
    """
    return {
        "text": _text(place / "text"),
        "tensors": _tensors(place / "tensors"),
        "once": _once(place / "once"),
        "map": _map(place / "map"),
        "folder": _folder(place / "folder"),
        "lines": _lines(place / "lines"),
        "journal": _journal(place / "journal"),
        "layers": _layers(place / "layers"),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes about torn lines, of which there are many here."""
    log = logging.getLogger("hf_polyspec.storage")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def fresh(folder: Path) -> None:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _swept(folder: Path) -> None:
    """What a kill left half written goes away when the next writer takes the folder."""
    with locks.one_writer(folder):
        assert not list(folder.glob(f".*{atomic.PARTIAL}"))


def _text(folder: Path) -> Workload:
    file, old, new = folder / "plan.json", {"old": "ä" * 50}, {"new": ["ö" * 9000]}

    def prepare() -> None:
        fresh(folder)
        atomic.write_json(file, old)

    def check() -> bool:
        found = reading.read_json(file)
        assert found in (old, new)
        _swept(folder)
        return bool(found == new)

    return Workload(prepare, lambda: atomic.write_json(file, new), check)


def _tensors(folder: Path) -> Workload:
    file = folder / "weights.safetensors"
    old, new = {"x": torch.arange(5)}, {"x": torch.arange(4000), "y": torch.ones(3)}

    def prepare() -> None:
        fresh(folder)
        atomic.write_tensors(file, old)

    def check() -> bool:
        found = reading.read_tensors(file)
        changed = set(found) == set(new)
        assert all(torch.equal(found[name], tensor) for name, tensor in (new if changed else old).items())
        _swept(folder)
        return changed

    return Workload(prepare, lambda: atomic.write_tensors(file, new), check)


def _once(folder: Path) -> Workload:
    file, text = folder / "settings.json", "x" * 9000

    def check() -> bool:
        assert not file.exists() or file.read_text() == text
        _swept(folder)
        return file.exists()

    return Workload(lambda: fresh(folder), lambda: atomic.create_text(file, text), check)


def _map(folder: Path) -> Workload:
    file, size = folder / "features", 20_000

    def check() -> bool:
        assert not file.exists() or file.read_bytes() == bytes(size)
        _swept(folder)
        return file.exists()

    return Workload(lambda: fresh(folder), lambda: atomic.allocate(file, size), check)


def _folder(folder: Path) -> Workload:
    def write(version: int) -> None:
        with folders.filling(folder, replaces=("part-*",)) as place:
            for part in range(version):
                (place / f"part-{part}").write_text(f"{version}" * 3000)
            (place / "config.json").write_text(json.dumps({"parts": version}))

    def prepare() -> None:
        fresh(folder)
        (folder / "mine.txt").write_text("the user's")
        write(3)

    def check() -> bool:
        assert (folder / "mine.txt").read_text() == "the user's"
        if not (folder / "config.json").exists():  # the moves had begun, and nobody takes the folder for whole
            return False
        parts = json.loads((folder / "config.json").read_text())["parts"]
        assert sorted(path.name for path in folder.glob("part-*")) == [f"part-{part}" for part in range(parts)]
        assert all(path.read_text() == f"{parts}" * 3000 for path in folder.glob("part-*"))
        return bool(parts == 2)

    return Workload(prepare, lambda: write(2), check)


def _lines(folder: Path) -> Workload:
    file, old = folder / "curve.jsonl", ['{"step": 1}', '{"step": 2}']
    new = [json.dumps({"step": step, "text": "ü" * 3000}) for step in (3, 4)]

    def prepare() -> None:
        fresh(folder)
        lines.append_lines(file, old)

    def check() -> bool:
        with quiet():
            steps = [line["step"] for line in lines.read_lines(file)]
            assert steps == [1, 2, 3, 4][: len(steps)]
            assert len(steps) >= 2
            lines.append_lines(file, ['{"step": 5}'])
            assert [line["step"] for line in lines.read_lines(file)] == [*steps, 5]
        return len(steps) == 4

    return Workload(prepare, lambda: lines.append_lines(file, new), check)


def _journal(folder: Path) -> Workload:
    def rows(group: str) -> list[dict[str, Any]]:
        own = {"method": "plain", "temperature": 0.0, "group": group, "turn": 0, "own": 2}
        return [{**own, "row": row, "output": "ß" * 500} for row in range(2)]

    def prepare() -> None:
        fresh(folder)
        write_settings(folder, {"--seed": 0})
        Journal(folder, "records").append(rows("a"))

    def call() -> None:
        with locks.one_writer(folder):
            write_settings(folder, {"--seed": 0})
            journal = Journal(folder, "records")
            journal.open()
            journal.append(rows("b"))

    def check() -> bool:
        with quiet():
            found = {line["group"] for line in read_lines(folder, "records")}
            assert "a" in found
            call()
            assert read_lines(folder, "records") == [*rows("a"), *rows("b")]
        return "b" in found

    return Workload(prepare, call, check)


def _layers(folder: Path) -> Workload:
    torch_weights = [torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    wanted = [round_to_nearest(weight, 8) for weight in torch_weights]

    def same(one: QuantizedWeight | None, other: QuantizedWeight) -> bool:
        return one is not None and torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)

    def call() -> None:
        store = LayerStore(folder, {"bits": 8})
        store.remember("texts", [[1, 2, 3]])
        for number, weight in enumerate(wanted):
            if store.get(f"layer{number}") is None:
                store.put(f"layer{number}", weight)

    def check() -> bool:
        store = LayerStore(folder, {"bits": 8})
        assert store.recall("texts") in (None, [[1, 2, 3]])
        kept = [store.get(f"layer{number}") for number in range(3)]
        assert all(found is None or same(found, weight) for found, weight in zip(kept, wanted, strict=True))
        first = next((number for number, found in enumerate(kept) if found is None), 3)
        assert all(found is None for found in kept[first:])
        call()
        assert all(same(store.get(f"layer{number}"), weight) for number, weight in enumerate(wanted))
        return None not in kept

    return Workload(lambda: fresh(folder), call, check)


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any], bool]] = {}
"""Files that are damaged on purpose: how each is made in a folder, how it is read, and whether zeros are noticed."""


def _reader(name: str, make: Callable[[Path], Path], read: Callable[[Path], Any], zeros: bool = True) -> None:
    READERS[name] = (make, read, zeros)


def _made(name: str, write: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = folder / name
        write(file)
        return file

    return make


def _store_with_layer(file: Path) -> None:
    store = LayerStore(file.parent, {"bits": 8})
    store.put("layer", round_to_nearest(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), 8))


def _stored(file: Path) -> Any:
    found = LayerStore(file.parent, {"bits": 8}).get("layer")
    return None if found is None else found.codes.tolist()


_reader(
    "json", _made("plan.json", lambda file: atomic.write_json(file, {"a": [1, 2, {"b": "ä\n"}]})), reading.read_json
)
_reader(
    "tensors",
    _made("model.safetensors", lambda file: atomic.write_tensors(file, {"x": torch.arange(40), "y": torch.ones(7)})),
    lambda file: {name: tensor.tolist() for name, tensor in reading.read_tensors(file).items()},
    zeros=False,  # the format has no checksums
)
_reader(
    "state",
    _made("recovery.pt", lambda file: atomic.write_state(file, {"step": 3, "x": torch.arange(40)})),
    lambda file: str(reading.read_state(file)),
)
_reader("layer", _made("layer.safetensors", _store_with_layer), _stored, zeros=False)


def journal_prefix(file: Path, chance: Any, some: int) -> int:
    """Cut a journal anywhere: what is read are its first lines, and what is added stands alone after them."""
    rows = [{"step": step, "text": "ä" * (step % 5)} for step in range(6)]
    lines.append_lines(file, [json.dumps(row, ensure_ascii=False) for row in rows])
    content, count = file.read_bytes(), 0
    with quiet():
        for left in damaged(content, chance, some):
            file.write_bytes(left)
            count += 1
            try:
                found = lines.read_lines(file)
            except DamagedFileError as error:  # zeros that hold a line end are none
                check_told(error, file)
                continue
            assert found == rows[: len(found)]
            assert len(found) >= left.rstrip(b"\0").count(b"\n")
            lines.append_lines(file, ['{"step": "next"}'])
            assert lines.read_lines(file) == [*found, {"step": "next"}]
    file.unlink()
    return count
