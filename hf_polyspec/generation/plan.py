# SPDX-License-Identifier: Apache-2.0
"""A plan: which of the given assistants to use, at which sizes, and what was expected of it; kept as JSON."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..cpu.packing import is_packed
from ..levels.names import name_of
from ..storage.atomic import write_json
from ..storage.reading import read_json
from .options import PolySpecOptions

FORMAT = 1
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation_autoset")
_OPTIONS = (
    "num_assistant_tokens",
    "polyspec_block_size",
    "polyspec_direct_tokens",
    "polyspec_tree_tokens",
    "polyspec_tree_depth",
    "polyspec_tree_top_k",
)


@dataclass(frozen=True)
class Mark:
    """How a plan recognises a member of the chain.

    Attributes:
        name: for messages.
        fingerprint: of its configuration and of the shapes and types of its weights.
        synthetic: whether it stands in for a real one; its speed then says nothing about any.
    """

    name: str
    fingerprint: str
    synthetic: bool = False


@dataclass(frozen=True)
class Plan:
    """What `polyspec plan` found, as `generate(assistant_models=..., polyspec_plan=...)` takes it.

    Attributes:
        format: 1.
        made_by: the package and its version; machine: processor, versions and date.
        target: the model; assistants: all that were given, in order.
        temperature: 0 for greedy; new_tokens: most of a text.
        chosen: places in `assistants` to use, none for plain decoding; options: their sizes.
        tokens_per_second: predicted for the choice; plain_tokens_per_second: for plain generate().
        candidates: the best sizes of every subset: name, sizes, tokens a second: predicted, predicted
            anew and measured (the latter two None where it was not run).
        dropped: why assistants are left out: name, condition, left, right, sentence.
        costs: by level, what was measured: [tokens, batch, context, seconds] of rounds, [ids, seconds] of prompts.
        acceptance: by pair of levels, the mean survival by position.
        packed: whether the target was packed (`hf_polyspec.pack`) when it was measured.
    """

    made_by: str
    machine: str
    target: Mark
    assistants: tuple[Mark, ...]
    temperature: float
    new_tokens: int
    chosen: tuple[int, ...]
    options: dict[str, int]
    tokens_per_second: float
    plain_tokens_per_second: float
    candidates: tuple[dict[str, Any], ...] = ()
    dropped: tuple[dict[str, Any], ...] = ()
    costs: dict[str, Any] = field(default_factory=dict)
    acceptance: dict[str, list[float]] = field(default_factory=dict)
    packed: bool = False
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"this plan is of format {self.format!r}, and this version reads format {FORMAT}.")
        if list(self.chosen) != sorted({c for c in self.chosen if _is_count(c) and c < len(self.assistants)}):
            raise ValueError(
                f"the plan chooses assistants {list(self.chosen)}, which are not rising places among its "
                f"{len(self.assistants)}."
            )
        unknown = sorted(set(self.options) - set(_OPTIONS))
        if unknown:
            raise ValueError(f"the plan sets {unknown[0]!r}; a plan may set {', '.join(_OPTIONS)}.")
        sizes: dict[str, Any] = dict(self.options)
        PolySpecOptions(**sizes)
        for name in ("temperature", "tokens_per_second", "plain_tokens_per_second"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} of the plan must be a number of at least 0, got {value!r}.")

    @property
    def synthetic(self) -> bool:
        """Whether a synthetic level was among the assistants: its speeds are then of a schedule, not of a drafter."""
        return any(mark.synthetic for mark in self.assistants)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, JSON-serialisable."""
        return {**asdict(self), "synthetic": self.synthetic}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or out of range; the sentence names it.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a plan is a JSON object, got {type(values).__name__}.")
        given = {name: value for name, value in values.items() if name != "synthetic"}
        names = [one.name for one in fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"the plan has an unknown field {unknown[0]!r}; is it of another version?")
        missing = [name for name in names if name not in given and name != "packed"]
        if missing:
            raise ValueError(f"the plan lacks the field {missing[0]!r}.")
        try:
            given["target"] = Mark(**given["target"])
            given["assistants"] = tuple(Mark(**one) for one in given["assistants"])
            for name in ("chosen", "candidates", "dropped"):
                given[name] = tuple(given[name])
            return cls(**given)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the plan does not have the form of one: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; a file that is there is replaced whole or left alone."""
        write_json(path, self.to_dict(), indent=1, ensure_ascii=True)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            ValueError: there is no such file, or no plan in it; the sentence names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no plan at {path}.")
        values = read_json(path, remedy="make a new plan with `polyspec plan`, or name the file of one")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path} holds no plan that can be used: {error}") from error

    @classmethod
    def read(cls, given: Any) -> Plan:
        """A plan from whatever `polyspec_plan` was given: a `Plan`, its dict, or a path.

        Raises:
            TypeError: none of those; ValueError: as `load` and `from_dict`.
        """
        if isinstance(given, Plan):
            return given
        if isinstance(given, Mapping):
            return cls.from_dict(given)
        if isinstance(given, (str, Path)):
            return cls.load(given)
        raise TypeError(f"polyspec_plan must be a path, a dict or a Plan, got {type(given).__name__}.")

    def apply(self, target: Any, assistants: Sequence[Any]) -> tuple[list[Any], dict[str, int]]:
        """The assistants to use, and their options.

        Args:
            target: the model; assistants: those the plan was made for, in the same order.

        Returns:
            The chosen assistants (none for plain decoding) and the options of `generate()`. A warning says so
            where the plan was measured with a packed target and this one is not: it is then slower than planned.

        Raises:
            ValueError: the plan was made for other models; the sentence names the first that differs.
        """
        self._check("the target", self.target, target)
        if len(assistants) != len(self.assistants):
            names = ", ".join(mark.name for mark in self.assistants)
            raise ValueError(
                f"the plan was made for {len(self.assistants)} assistants ({names}), and {len(assistants)} were given; "
                "give the same ones in the same order: the plan says which of them to use."
            )
        for i, (mark, assistant) in enumerate(zip(self.assistants, assistants, strict=True)):
            self._check(f"assistant_models[{i}]", mark, assistant)
        if self.packed and isinstance(target, nn.Module) and not is_packed(target):
            warnings.warn(
                "The plan was measured with a packed target: hf_polyspec.pack(model) makes this one as quick.",
                stacklevel=2,
            )
        return [assistants[place] for place in self.chosen], dict(self.options)

    @staticmethod
    def _check(role: str, mark: Mark, given: Any) -> None:
        if fingerprint(given) != mark.fingerprint:
            raise ValueError(
                f"the plan was made for another model: {role} was {mark.name} and is now "
                f"{_name(given)} with another configuration or other weights' shapes; make a new plan with "
                "`polyspec plan`."
            )


def resolve_plan(
    given: Any, target: Any, assistants: Any, explicit: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """What `polyspec_plan` makes of a call: the assistants to use, and the options that the caller did not set.

    Args:
        given: the value of `polyspec_plan`; target: the model; assistants: the caller's list.
        explicit: options the caller passed by name; None means not passed.

    Raises:
        ValueError, TypeError: as `Plan.read` and `Plan.apply`.
    """
    plan = Plan.read(given)
    if not isinstance(assistants, (list, tuple)):
        raise TypeError("polyspec_plan needs assistant_models: the list of assistants that the plan was made for.")
    chosen, options = plan.apply(target, assistants)
    return chosen, {name: value for name, value in options.items() if explicit.get(name) is None}


def fingerprint(member: Any) -> str:
    """A hash of a member's configuration and of the names, shapes and types of its weights; values do not count."""
    if isinstance(member, nn.Module):
        config: Any = getattr(member, "config", None)
        told = config.to_dict() if hasattr(config, "to_dict") else {}
        told = {name: value for name, value in told.items() if name not in _VOLATILE}
        weights = _shapes(member)
    else:
        simple = (bool, int, float, str, type(None))
        told = {k: v for k, v in vars(member).items() if isinstance(v, simple) and not k.startswith("_")}
        told = {name: value for name, value in told.items() if name not in ("index", "vocabulary")}
        weights = {}
    text = json.dumps([type(member).__name__, told, weights], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shapes(model: nn.Module) -> dict[str, str]:
    """Shape and type of every weight by name. Nothing is copied or converted: this is asked in every generation."""
    from ..quantization.modules import quantized_layers

    quantized = quantized_layers(model)
    # The state of a quantised layer is that of a checkpoint, which takes packing all of its integers.
    weights = dict(model.named_parameters()) if quantized else model.state_dict()
    found = {name: f"{tuple(w.shape)} {w.dtype}" for name, w in weights.items() if hasattr(w, "shape")}
    for name, layer in quantized.items():
        found[name] = f"{layer.out_features, layer.in_features} {layer.bits} bits by {layer.group_size}"
    return found


def mark_of(member: Any, name: str) -> Mark:
    """A member as a plan remembers it."""
    return Mark(name, fingerprint(member), bool(getattr(member, "synthetic", False)))


def _name(member: Any) -> str:
    return name_of(member) or type(member).__name__


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
