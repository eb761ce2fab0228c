# SPDX-License-Identifier: Apache-2.0
"""Everything that decides how a head is trained, in one file that reproduces the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from hf_polyspec.eagle.configuration import ALGORITHMS
from hf_polyspec.eagle.training.generation import GenerationSettings
from hf_polyspec.eagle.training.losses import OBJECTIVES
from hf_polyspec.storage.atomic import write_text
from hf_polyspec.storage.reading import read_text

T = TypeVar("T")

WRITERS = ("target", "int8")
PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class HeadSettings:
    """What kind of head is trained.

    Args:
        algorithm: `"eagle1"` (used by EAGLE-2 as well) or `"eagle3"`.
        draft_vocab_size: ids the head scores, or None for all of the target's.
        own_lm_head: whether the head trains an output layer of its own; without one it uses the target's rows and
            the checkpoint stays small.
        overrides: any field of `EagleHeadConfig`.
    """

    algorithm: str = "eagle3"
    draft_vocab_size: int | None = 32_000
    own_lm_head: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("algorithm", self.algorithm, ALGORITHMS)


@dataclass(frozen=True)
class OptimizationSettings:
    """How the head is trained. The defaults are the published ones where a small run can use them.

    Args:
        epochs: passes over the texts.
        steps: draft steps of training-time test; EAGLE-1 uses 1.
        step_decay: weight of each draft step against the one before.
        row_stride: one row in so many drafts on after the first step and stands for the others in the loss (EAGLE-3).
            All rows cost `steps` times the first step; with 4, each further step costs a quarter.
        batch_tokens: tokens in a micro-batch of one process, padding included.
        accumulation: micro-batches of a process in an optimizer step.
        learning_rate: peak.
        warmup_steps: optimizer steps up to the peak.
        schedule: `"linear"`, `"cosine"` or `"constant"` after the warm-up.
        optimizer: `"adamw"`, or `"muon"` for the inner matrices and AdamW for the rest; Muon computes in bfloat16,
            slowly on processors without instructions for it.
        beta2: AdamW's second moment; the first is 0.9.
        weight_decay: of all weights.
        clip: largest gradient norm (EAGLE-3) or gradient value (EAGLE-1).
        feature_noise: EAGLE-1's noise on features; ignored by EAGLE-3.
        feature_weight: EAGLE-1's weight of the feature regression.
        token_weight: EAGLE-1's weight of the objective.
        objective: what head and target are compared by: `"cross_entropy"` as in EAGLE's papers, or
            `"negative_log_acceptance"`, which asks for nothing but that drafts are accepted; see `OBJECTIVES`.
        greedy_temperature: what the target's law is learned at where the target wrote greedily, at most 1; below 1 its
            favourite counts for more, as it does where it is decoded so.
        softmax_ids: ids besides a batch's own that its loss is computed over, for heads that score the
            target's whole vocabulary with its rows (`draft_vocab_size: null`, `own_lm_head: false`); see `SoftmaxIds`.
            None for all of them.
        learn_prompts: whether prompts are learned as well; positions that are not cost only what is attended to.
        max_length: longer texts are cut.
        validation_fraction: share of texts held out.
        validation_steps: draft positions whose acceptance is measured.
        validation_texts: most held-out texts looked at.
        validate_every: optimizer steps between validations; the end of the run always has one.
        checkpoint_every: optimizer steps between checkpoints; the end of the run always has one.
        keep_checkpoints: how many are kept.
        log_every: optimizer steps between lines of the curve.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        feature_cache: whether features are kept on disk after the first epoch.
        seed: decides initial weights, split, order and noise.
    """

    epochs: int = 10
    steps: int = 7
    step_decay: float = 0.8
    row_stride: int = 1
    batch_tokens: int = 4096
    accumulation: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    schedule: str = "cosine"
    optimizer: str = "adamw"
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 0.5
    feature_noise: float = 0.2
    feature_weight: float = 1.0
    token_weight: float = 0.1
    objective: str = "cross_entropy"
    greedy_temperature: float = 1.0
    softmax_ids: int | None = None
    learn_prompts: bool = False
    max_length: int = 2048
    validation_fraction: float = 0.03
    validation_steps: int = 6
    validation_texts: int = 200
    validate_every: int = 500
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 10
    mixed_precision: str = "no"
    feature_cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("objective", self.objective, tuple(OBJECTIVES))
        _one_of("mixed_precision", self.mixed_precision, PRECISIONS)
        counts = ("epochs", "steps", "row_stride", "batch_tokens", "accumulation", "max_length", "log_every")
        checks = ("validation_steps", "validation_texts", "validate_every", "checkpoint_every", "keep_checkpoints")
        for name in (*counts, *checks):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.softmax_ids is not None and (type(self.softmax_ids) is not int or self.softmax_ids < 1):
            raise ValueError(f"softmax_ids must be a whole number of at least 1, not {self.softmax_ids!r}")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction must be between 0 and 1, not {self.validation_fraction}")
        if not 0.0 < self.greedy_temperature <= 1.0:
            raise ValueError(f"greedy_temperature must be above 0 and at most 1, not {self.greedy_temperature}")
        if self.learning_rate <= 0.0 or self.clip <= 0.0:
            raise ValueError("learning_rate and clip must be above 0")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of an optimizer step.

        Args:
            step: steps done before, from 0.
            total: steps of the whole run.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        if self.schedule == "linear":
            return self.learning_rate * (1.0 - done)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class TrainingConfig:
    """One run: target, texts, head and optimisation.

    Args:
        target: folder or hub id of the model the head is for.
        output: folder of the run: texts, checkpoints, curve and the finished head.
        revision: of the target on the hub.
        dtype: of the target's weights, `"auto"` for the checkpoint's own.
        prompts: the user's file of prompts, or None to let the target invent them.
        exclude: a file of prompts that must not be trained on, such as a benchmark's.
        texts: a folder of shards written before, or several; nothing is generated then.
        validate_on: those of the folders whose held-out texts acceptance is measured on, where a head to go on with
            may have learned texts of the others; all of them if None.
        writer: who writes the texts, the `"target"` or its `"int8"` copy, faster on CPUs.
        reader: whose features and distributions the head learns from, likewise. A head that will draft for a
            quantised middle loses nothing by learning from a quantised copy.
        init_from: a head to go on training instead of a fresh one.
        generation: how texts are made.
        head: what is trained.
        optimization: how it is trained.
    """

    target: str
    output: str
    revision: str | None = None
    dtype: str = "auto"
    prompts: str | None = None
    exclude: str | None = None
    texts: str | list[str] | None = None
    validate_on: str | list[str] | None = None
    writer: str = "target"
    reader: str = "target"
    init_from: str | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)

    def __post_init__(self) -> None:
        _one_of("writer", self.writer, WRITERS)
        _one_of("reader", self.reader, WRITERS)
        strange = [folder for folder in _listed(self.validate_on) if Path(folder) not in self.texts_folders]
        if strange:
            raise ValueError(f"validate_on names {', '.join(strange)}, which is not among the folders of texts")
        if self.optimization.softmax_ids is not None and (self.head.draft_vocab_size or self.head.own_lm_head):
            raise ValueError(
                "softmax_ids is for heads that score the whole vocabulary with the target's lm_head: set "
                "head.draft_vocab_size to null and head.own_lm_head to false"
            )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output)

    @property
    def texts_folders(self) -> list[Path]:
        """Where the texts are; the run's own folder alone unless others were given."""
        return [Path(folder) for folder in _listed(self.texts)] or [self.folder / "texts"]

    @property
    def validation_places(self) -> set[int]:
        """Which of `texts_folders` acceptance is measured on."""
        wanted = {Path(folder) for folder in _listed(self.validate_on)}
        return {place for place, folder in enumerate(self.texts_folders) if not wanted or folder in wanted}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in a config file."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Writes the config as YAML, whole or not at all.

        Args:
            path: the file.
        """
        write_text(path, yaml.safe_dump(self.as_dict(), sort_keys=False))


def load_config(path: Path) -> dict[str, Any]:
    """Reads a config file.

    Args:
        path: YAML or JSON.

    Raises:
        ValueError: the file is missing, cannot be parsed or is not a mapping.
    """
    if not path.is_file():
        raise ValueError(f"there is no config file at {path}")
    text = read_text(path, "write it anew, in UTF-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, not {type(values).__name__}")
    return values


def build_config(values: Mapping[str, Any]) -> TrainingConfig:
    """Makes a config of plain values.

    Args:
        values: as in a config file; what is absent takes its default.

    Raises:
        ValueError: a name is unknown, a value has the wrong type or cannot be used, or the target is missing.
    """
    kinds: dict[str, type] = {
        "generation": GenerationSettings,
        "head": HeadSettings,
        "optimization": OptimizationSettings,
    }
    rest = {name: value for name, value in values.items() if name not in kinds}
    parts: dict[str, Any] = {name: _build(kind, section_of(values, name), name) for name, kind in kinds.items()}
    for name in ("target", "output"):
        if not rest.get(name):
            raise ValueError(f"the config does not say {name!r}")
    return _build(TrainingConfig, {**rest, **parts}, "config")


def section_of(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a config's plain values, empty where it is left out.

    Raises:
        ValueError: it does not hold names and values.
    """
    found = values.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{name} in the config must hold names and values, not {type(found).__name__}")
    return found or {}


def _build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    known = {item.name: item for item in fields(cast(Any, kind))}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown setting in {where}: {', '.join(unknown)}; known are {', '.join(known)}")
    checked = {}
    for name, value in values.items():
        default = known[name].default
        if value is None and "None" in str(known[name].type):
            pass
        elif isinstance(default, float) and isinstance(value, (str, int)) and not isinstance(value, bool):
            # YAML reads 1e-4 as a word
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{where}.{name} must be a number, not {value!r}") from None
        elif isinstance(default, bool) != isinstance(value, bool) and isinstance(default, (bool, int)):
            raise ValueError(f"{where}.{name} must be of type {type(default).__name__}, not {value!r}")
        elif isinstance(default, int) and not isinstance(value, int):
            raise ValueError(f"{where}.{name} must be a whole number, not {value!r}")
        checked[name] = value
    return kind(**checked)


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
