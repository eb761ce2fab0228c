# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all; tests/faults interrupts, kills and starves their writers."""

from __future__ import annotations

import errno
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_polyspec.errors import DamagedFileError, FolderInUseError
from hf_polyspec.storage import atomic, checkpoints, folders, lines, locks, reading


@pytest.fixture
def umask() -> Any:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_kind_of_file_comes_back_with_the_mode_the_umask_leaves(tmp_path: Path, umask: None) -> None:
    tensors = {"x": torch.arange(6).view(2, 3)}
    atomic.write_bytes(tmp_path / "new" / "bytes", b"\0\r\n")
    atomic.write_text(tmp_path / "text", "ä\n")
    atomic.write_json(tmp_path / "json", {"ä": [1, None]})
    atomic.write_tensors(tmp_path / "torch", tensors, {"format": "pt"})
    atomic.write_tensors(tmp_path / "numpy", {"x": np.arange(6, dtype=np.int16)})
    atomic.write_state(tmp_path / "state", tensors)
    atomic.allocate(tmp_path / "map", 10_000)
    assert (tmp_path / "new" / "bytes").read_bytes() == b"\0\r\n"
    assert reading.read_text(tmp_path / "text") == "ä\n"
    assert reading.read_json(tmp_path / "json") == {"ä": [1, None]}
    assert torch.equal(reading.read_tensors(tmp_path / "torch")["x"], tensors["x"])
    assert reading.read_tensors(tmp_path / "numpy")["x"].dtype is torch.int16
    assert torch.equal(reading.read_state(tmp_path / "state")["x"], tensors["x"])
    assert (tmp_path / "map").read_bytes() == bytes(10_000)
    assert (tmp_path / "map").stat().st_blocks * 512 >= 10_000  # its room is there, not promised
    assert {mode(path) for path in tmp_path.iterdir() if path.is_file()} == {0o640}
    assert len(names(tmp_path)) == 7


def test_a_file_that_is_replaced_keeps_its_mode_and_a_link_its_place(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    file.chmod(0o604)
    link.symlink_to(file)
    atomic.write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert mode(file) == 0o604


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic.write_text(pipe, "told")
    assert os.read(reader, 100) == b"told"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def failing() -> None:
        with atomic.replacing(file) as place:
            place.write_text("half")
            raise KeyError("not a disk's fault")

    with pytest.raises(KeyError):
        failing()
    with pytest.raises(TypeError):
        atomic.write_json(file, {"x": object()})
    with pytest.raises(OSError, match="file"):
        atomic.write_text(tmp_path / "file" / "below", "x")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_library_that_hides_a_full_disk_is_an_oserror_with_the_name(tmp_path: Path) -> None:
    def failing(cause: Exception) -> None:
        with atomic.replacing(tmp_path / "file"):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                raise cause from None if str(cause) else cause

    for cause in (RuntimeError("I/O error: No space left on device (os error 28)"), ValueError("it failed")):
        with pytest.raises(OSError, match="file") as found:
            failing(cause)
        assert found.value.errno == errno.ENOSPC
        assert found.value.filename == str(tmp_path / "file")


def test_of_several_that_create_a_file_one_does(tmp_path: Path) -> None:
    made = [atomic.create_text(tmp_path / "new" / "file", text) for text in ("first", "second")]
    assert made == [True, False]
    assert (tmp_path / "new" / "file").read_text() == "first"
    assert names(tmp_path / "new") == ["file"]


def test_creating_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "this file system knows no links")

    monkeypatch.setattr(os, "link", refuse)
    assert atomic.create_text(tmp_path / "file", "first")
    assert not atomic.create_text(tmp_path / "file", "second")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_room_is_written_where_it_cannot_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    monkeypatch.setattr(atomic, "_CHUNK", 4096)
    atomic.allocate(tmp_path / "map", 10_001)
    assert (tmp_path / "map").read_bytes() == bytes(10_001)
    atomic.allocate(tmp_path / "map", 0)
    assert (tmp_path / "map").read_bytes() == b""


def test_a_folder_gets_its_last_files_last_and_loses_old_parts(tmp_path: Path, umask: None) -> None:
    folder = tmp_path / "made"
    for parts in (3, 2):
        with folders.filling(folder, replaces=("part-*",)) as place:
            (place / "config.json").write_text(str(parts))
            for part in range(parts):
                atomic.write_tensors(place / f"part-{part}", {"x": torch.ones(1)})
                (place / f"part-{part}").chmod(0o600)
            (place / "deep").mkdir()
            (place / "deep" / "file").touch()
            assert (folder / "config.json").exists() == (parts == 2)
    assert names(folder) == ["config.json", "deep", "part-0", "part-1"]
    assert {mode(path) for path in folder.glob("part-*")} == {0o640}


def test_a_folder_stays_as_it_was_where_filling_fails(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("old")

    def failing() -> None:
        with folders.filling(tmp_path) as place:
            (place / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert names(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "old"


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "made").mkdir()
        (tmp_path / "made" / f"file{number}").touch()
        folders.put_folder(tmp_path / "made", tmp_path / "step")
    assert names(tmp_path) == ["step"]
    assert names(tmp_path / "step") == ["file2"]
    with pytest.raises(OSError, match="missing"):
        folders.put_folder(tmp_path / "missing", tmp_path / "step")
    assert names(tmp_path / "step") == ["file2"]


def test_lines_are_added_after_whole_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "new" / "curve.csv"
    lines.append_lines(file, ["1,0.5"], first="step,loss")
    lines.append_lines(file, ["2,0.4"], first="step,loss")
    assert file.read_text() == "step,loss\n1,0.5\n2,0.4\n"
    with file.open("a") as opened:
        opened.write("3")  # of 30, perhaps
    assert lines.read_lines(file, str) == ["step,loss", "1,0.5", "2,0.4"]
    assert "curve.csv ended in half a line" in caplog.text
    lines.append_lines(file, ["3,0.3"], first="step,loss")
    assert file.read_text() == "step,loss\n1,0.5\n2,0.4\n3,0.3\n"
    file.write_text("step,lo")
    lines.mend(file)
    assert file.read_text() == ""
    lines.append_lines(file, ["1,0.5"], first="step,loss")
    assert file.read_text() == "step,loss\n1,0.5\n"
    assert lines.read_lines(tmp_path / "missing") == []
    lines.mend(tmp_path / "missing")


def test_lines_are_added_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = tmp_path / "lines", os.write
    lines.append_lines(file, ["1"])

    def full(handle: int, content: memoryview) -> int:
        if len(content) > 4:
            return write(handle, content[:5])  # a line and a half
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="lines") as found:
            lines.append_lines(file, ["2", "345"])
    assert found.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"1\n"


def test_a_torn_line_longer_than_what_is_read_at_once_goes_whole(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"1\n" + b"x" * (3 * lines._WINDOW))
    lines.append_lines(file, ["2"])
    assert file.read_bytes() == b"1\n2\n"


def test_a_line_in_the_middle_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "records-0.jsonl"
    file.write_text('{"a": 1}\n\n{"a": \n{"a": 2}\n')
    with pytest.raises(DamagedFileError, match=r"records-0\.jsonl is damaged \(line 3 .*delete that line") as found:
        lines.read_lines(file)
    again = pickle.loads(pickle.dumps(found.value))
    assert (str(again), again.path) == (str(found.value), str(file))


def test_one_writer_a_folder_and_no_leftovers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / f".x{atomic.PARTIAL}").mkdir(parents=True)
    (folder / f".file.1234{atomic.PARTIAL}").touch()
    with locks.one_writer(folder):
        assert not list(folder.glob("*.partial"))
        with pytest.raises(FolderInUseError, match="Another process is writing into"), locks.one_writer(folder):
            pass
        with locks.one_writer(folder, rank=1, processes=2):
            pass
    with locks.one_writer(folder):
        pass


def test_json_that_is_something_else_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for content, told in (
        (b"", "it is empty"),
        (b"{", "it holds no JSON"),
        (b"[" * 100_000, "it holds no JSON"),
        (b"\xff{}", "it is not UTF-8 text"),
        (b"[1]", "it holds a list where an object belongs"),
        (b"null", "it holds null where an object belongs"),
    ):
        file.write_bytes(content)
        with pytest.raises(DamagedFileError) as found:
            reading.read_json(file, remedy="write it again")
        assert f"config.json is damaged ({told}" in str(found.value)
        assert str(found.value).endswith("): write it again.")
    with pytest.raises(FileNotFoundError):
        reading.read_json(tmp_path / "missing")


def test_too_little_memory_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="allocate memory"), reading.reading(tmp_path):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def test_the_damaged_file_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "config.json", {"model_type": "llama"})
    atomic.write_tensors(tmp_path / "model-1.safetensors", {"x": torch.ones(9)})
    atomic.write_state(tmp_path / "pytorch_model.bin", {"x": torch.ones(9)})
    index = tmp_path / "model.safetensors.index.json"
    atomic.write_json(index, {"weight_map": {"x": "model-1.safetensors"}})
    assert checkpoints.damage_in(tmp_path) is None
    assert checkpoints.damage_in("owner/nothing-of-this-name") is None
    assert checkpoints.damage_in("no id: at all") is None
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        found = checkpoints.damage_in(tmp_path)
        assert found is not None
        assert path.name in str(found)
        path.write_bytes(content)
    for content in ({"weight_map": ["x"]}, {"weight_map": {"x": 1}}, {}):
        atomic.write_json(index, content)
        assert f"{index.name} is damaged (it has no weight_map" in str(checkpoints.damage_in(tmp_path))
    with pytest.raises(KeyError), checkpoints.loading(tmp_path / "nowhere"):
        raise KeyError
    with pytest.raises(ValueError, match="it has no weight_map") as refused, checkpoints.loading(tmp_path):
        raise KeyError
    assert type(refused.value) is ValueError
