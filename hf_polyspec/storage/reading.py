# SPDX-License-Identifier: Apache-2.0
"""Reading files that a download, a copy or a kill may have cut short."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_polyspec.errors import DamagedFileError

AGAIN = "delete it and have it written or downloaded again"
_BROKEN = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    EOFError,
    RuntimeError,
    pickle.UnpicklingError,
)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], remedy: str = AGAIN, what: str | None = None) -> Iterator[None]:
    """Turn what a parser says about a damaged file into one sentence that names it.

    Args:
        path: what the block reads, and nothing else.
        remedy: what the user can do, without a full stop.
        what: is wrong; the first sentence of the parser's own words unless told.

    Raises:
        DamagedFileError: the block could not make sense of the file.
        OSError: it is missing or cannot be opened, as the system says it.
    """
    from safetensors import SafetensorError

    broken: tuple[type[Exception], ...] = (*_BROKEN, SafetensorError, *_yaml_errors())
    try:
        yield
    except DamagedFileError:
        raise
    except OSError as error:
        # the system names the file; torch's reader of an archive that was cut off does not
        if error.errno != errno.EINVAL or error.filename is not None:
            raise
        raise DamagedFileError(path, what or _first_sentence(error), remedy) from error
    except broken as error:
        if "allocate memory" in str(error):  # torch's RuntimeError for a machine that is too small, not a damaged file
            raise
        raise DamagedFileError(path, what or _first_sentence(error), remedy) from error


def read_text(path: str | os.PathLike[str], remedy: str = AGAIN) -> str:
    """A UTF-8 file. Raises DamagedFileError where it is none, OSError where there is none."""
    with reading(path, remedy, "it is not UTF-8 text"):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: type = dict, remedy: str = AGAIN) -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        kind: what it must hold, `dict` or `list`; `object` for anything.
        remedy: what the user can do where it does not.

    Raises:
        DamagedFileError: no JSON, or of another kind. OSError: it cannot be read.
    """
    text = read_text(path, remedy)
    if not text.strip():
        raise DamagedFileError(path, "it is empty", remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise DamagedFileError(path, f"it holds no JSON{where}", remedy) from error
    if not isinstance(value, kind):
        raise DamagedFileError(path, f"it holds {_kind(value)} where {_kind(kind())} belongs", remedy)
    return value


def read_tensors(path: str | os.PathLike[str], remedy: str = AGAIN) -> dict[str, Any]:
    """The torch tensors of a safetensors file. Raises DamagedFileError, OSError."""
    from safetensors.torch import load_file

    with reading(path, remedy):
        return load_file(path)


def read_state(path: str | os.PathLike[str], remedy: str = AGAIN) -> Any:
    """What `torch.save` wrote, tensors and plain values only, on the CPU. Raises DamagedFileError, OSError."""
    import torch

    with reading(path, remedy, "it ends early or is no file of tensors"):
        return torch.load(path, weights_only=True, map_location="cpu")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {"dict": "an object", "list": "a list", "str": "a text", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


def _yaml_errors() -> tuple[type[Exception], ...]:
    """YAML's own, which is no ValueError, where the package is installed."""
    with contextlib.suppress(ImportError):
        from yaml import YAMLError

        return (YAMLError,)
    return ()


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.split(". ")[0].rstrip(".")
    return text if len(text) <= 160 else text[:157] + "..."
