# SPDX-License-Identifier: Apache-2.0
"""One file, written whole or left as it was.

The content goes to a file beside the wanted one, is forced to disk, and takes its place by a rename. A kill leaves a
hidden `.NAME.XXXXXXXX.partial` at most, which `locks.one_writer` clears away.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
_PROBE = 1 << 20
_CHUNK = 1 << 22


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place to write a file to, which becomes `path` when the block ends well.

    For libraries that write to a path themselves; the place ends in `.partial`, so a format that they would tell from
    the ending must be named. Symbolic links are followed, and a file's mode is kept: an old one's, or what the umask
    leaves. What is no regular file (`/dev/stdout`, a pipe) is written to directly.

    Args:
        path: the file; its folder is made if need be.

    Raises:
        OSError: it cannot be written, a full disk included, whatever the library inside makes of that.
    """
    wanted = Path(os.path.realpath(path))
    if wanted.exists() and not wanted.is_file():
        yield Path(path)
        return
    wanted.parent.mkdir(parents=True, exist_ok=True)
    place = wanted.parent / f".{wanted.name[:200]}.{secrets.token_hex(4)}{PARTIAL}"
    mode = _create(place, wanted)
    try:
        try:
            yield place
            sync(place)
        except Exception as error:
            reason = _disk_error(error, place)
            if reason is not None and (reason is not error or reason.filename is None):
                raise OSError(reason.errno, os.strerror(reason.errno or 0), str(path)) from error
            raise
        os.chmod(place, mode)
        os.replace(place, wanted)
    except BaseException:
        with contextlib.suppress(OSError):
            place.unlink()
        raise
    sync_folder(wanted.parent)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    with replacing(path) as place, open(place, "wb") as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write a UTF-8 file whole or not at all, line ends as given. Raises OSError."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any, **options: Any) -> None:
    """Write a value as JSON, whole or not at all.

    Args:
        path: the file.
        value: anything that JSON holds; it is turned into text before the disk is touched.
        options: for `json.dumps`; indent=2 and ensure_ascii=False unless told.

    Raises:
        OSError: it cannot be written. TypeError, ValueError: the value is no JSON.
    """
    write_text(path, json.dumps(value, **{"indent": 2, "ensure_ascii": False, **options}) + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all.

    Args:
        path: the file.
        tensors: all of torch or all of numpy, contiguous, none sharing memory with another.
        metadata: kept in its header.

    Raises:
        OSError: it cannot be written.
    """
    import torch

    if all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        from safetensors.torch import save_file
    else:
        from safetensors.numpy import save_file  # type: ignore[assignment]
    with replacing(path) as place:
        save_file(dict(tensors), place, metadata=None if metadata is None else dict(metadata))


def write_state(path: str | os.PathLike[str], state: Any) -> None:
    """`torch.save` whole or not at all. Raises OSError."""
    import torch

    with replacing(path) as place:
        torch.save(state, place)


def create_text(path: str | os.PathLike[str], content: str) -> bool:
    """Write a UTF-8 file that is not there yet; of several processes that try, one does.

    Args:
        path: the file; its folder is made if need be.
        content: of it.

    Returns:
        Whether this call made it. A file that was there stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    wanted = Path(path)
    if wanted.exists():
        return False
    place = wanted.parent / f".{wanted.name[:200]}.{secrets.token_hex(4)}{PARTIAL}"
    write_text(place, content)
    try:
        os.link(place, wanted)  # made whole or not at all, and not twice
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
            raise
        if wanted.exists():  # a file system without links: the last of two that got here wins
            return False
        os.replace(place, wanted)
    finally:
        place.unlink(missing_ok=True)
    sync_folder(wanted.parent)
    return True


def allocate(path: str | os.PathLike[str], size: int) -> None:
    """Make a file of zeros that has its room on the disk, for a memory map to write into.

    Storing into a mapped file for which the disk has no room is SIGBUS, which ends the process; this is where a full
    disk is found instead. The file is replaced if it is there, and is on disk when this returns.

    Args:
        path: the file; its folder is made if need be.
        size: bytes.

    Raises:
        OSError: the disk has no room for it; nothing is left behind.
    """
    with replacing(path) as place, open(place, "r+b") as file:
        if size and not _allocated(file.fileno(), size):
            zeros = bytes(min(size, _CHUNK))
            for start in range(0, size, _CHUNK):
                file.write(zeros[: size - start])


def sync(path: Path) -> None:
    """Force a file's content to disk. Raises OSError."""
    handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, where the system can."""
    if os.name == "nt":
        return
    # Some network file systems know no fsync of folders; a rename is in order there all the same.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _create(place: Path, wanted: Path) -> int:
    """Make the file beside; the mode that the finished one gets."""
    handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        made = os.fstat(handle)
    finally:
        os.close(handle)
    # Libraries replace the file (safetensors makes it readable by its owner alone), so the mode is set at the end.
    return stat.S_IMODE(wanted.stat().st_mode if wanted.exists() else made.st_mode)


def _allocated(handle: int, size: int) -> bool:
    """Whether the file system gave the room at once; some cannot."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            return False
        raise
    return True


def _disk_error(error: BaseException, place: Path) -> OSError | None:
    """The system's word on why a library failed to write, None if the disk has nothing to do with it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        told = re.search(r"\((?:os error|code:?) (\d+)\)", str(cause))
        if told:
            return OSError(int(told.group(1)), os.strerror(int(told.group(1))))
        cause = cause.__cause__ or cause.__context__
    if type(error) is not RuntimeError:  # torch's word for everything its own writer meets
        return None
    try:
        with open(place, "ab") as file:
            file.write(bytes(_PROBE))
    except OSError as found:
        return found
    return None
