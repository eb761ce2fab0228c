# SPDX-License-Identifier: Apache-2.0
"""Which file of a checkpoint's folder is damaged, asked once loading has failed.

Loaders of libraries answer a download that was cut off with pages of advice or with a parser's own words; this finds
the file they mean.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hf_polyspec.errors import DamagedFileError

from .reading import read_json, read_state, reading

REMEDY = "copy or download it again"
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "adapter_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


@contextlib.contextmanager
def loading(source: str | os.PathLike[str]) -> Iterator[None]:
    """Where the block fails and a file of the checkpoint is damaged, say that instead.

    Args:
        source: the folder, or the hub id whose downloaded files are looked at.

    Raises:
        ValueError: from whatever the block raised; a plain one, as loaders refuse everything else, which says what a
            `DamagedFileError` does.
    """
    try:
        yield
    except Exception as error:
        found = error if isinstance(error, DamagedFileError) else damage_in(source)
        if found is None:
            raise
        raise ValueError(str(found)) from error


def damage_in(source: str | os.PathLike[str]) -> DamagedFileError | None:
    """What is wrong with the first damaged file of a checkpoint, None where all can be read.

    Args:
        source: the folder, or a hub id; settings, tokenizer, index and weights are looked at, of safetensors files
            the header and the size only.
    """
    folder = _folder(source)
    if folder is None:
        return None
    try:
        for name in _SETTINGS:
            if (folder / name).is_file():
                read_json(folder / name, remedy=REMEDY)
        for index in sorted(folder.glob("*.index.json")):
            _check_index(index)
        for weights in sorted(folder.glob("*.safetensors")):
            check_tensors(weights)
        for pickled in sorted(folder.glob("*.bin")):
            read_state(pickled, REMEDY)
    except DamagedFileError as error:
        return error
    except OSError:
        return None
    return None


def check_tensors(path: Path, remedy: str = REMEDY) -> None:
    """Read a safetensors file's header, and see that the file is as long as it says. Raises DamagedFileError."""
    from safetensors import safe_open

    with reading(path, remedy), safe_open(path, framework="pt"):
        pass


def _check_index(path: Path) -> None:
    places = read_json(path, remedy=REMEDY).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise DamagedFileError(path, "it has no weight_map from tensors to files", REMEDY)


def _folder(source: str | os.PathLike[str]) -> Path | None:
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):
        found = try_to_load_from_cache(os.fspath(source), "config.json")
        if isinstance(found, str):
            return Path(found).parent
    return None
