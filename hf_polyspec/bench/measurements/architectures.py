# SPDX-License-Identifier: Apache-2.0
"""Every class of the installed transformers that makes text, as a target: `polyspec measure architectures`.

Each is built tiny and random, in float32; greedy text of chains of two and three, with a copy that is always right and
one that is often wrong, is compared with plain generate()'s, for one prompt and for a left-padded batch of three; so is
a text that is drawn under a seed. All classes take minutes: `--part 1/4 --findings found.jsonl` does a quarter and adds
it to a file, and the page is made of all that the file holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import LevelError, RollbackError
from ...generation.alone import ALONE
from ...generation.doors import generate
from ...host.generation import quiet
from ...host.modeling import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from ...host.peculiar import check_generate
from ...host.release import installed
from . import arguments
from .picture_chains import see
from .tiny_models import noisy, prompts, tiny_model

NEW = 14
DRAFT = 5
WORTH = 0.4
"""Most target passes a token at which a chain with an exact copy counts as gaining something."""
NOISE = (0.02, 0.05)
LARGEST = 80_000_000
SECONDS = 60
MEMORY = 8 << 30

EQUAL, GAINLESS, REFUSED = "equal", "served without gain", "refused"
DIFFERENT, CRASHED, NO_PLAIN, UNBUILT = "different", "crashed", "plain fails", "not built"
VERDICTS = {
    EQUAL: "every chain gave plain generate()'s text, and an exact copy saved passes",
    GAINLESS: f"the text is plain's, at more than {WORTH} target passes a token with an exact copy, or alone",
    REFUSED: "before the first forward pass, with this sentence",
    DIFFERENT: "another text",
    CRASHED: "an error within a pass",
    NO_PLAIN: "plain generate() itself fails on text alone",
    UNBUILT: "not small enough, or not with the numbers of this command",
}


@dataclass(frozen=True)
class Finding:
    """What became of one class.

    Attributes:
        kind: "causal" or "image-text"; model_type: as in its config; name: the class.
        verdict: one of `VERDICTS`.
        passes: target passes a token with an exact copy, of one row and of three; None where none ran.
        note: a sentence: the refusal, the error, or how rows ran.
        sampled: whether a text drawn under a seed was plain generate()'s, None where none was drawn.
        pictures: "same", "other", "refused" or "crashed" with a picture in each prompt, None where none was.
    """

    kind: str
    model_type: str
    name: str
    verdict: str
    passes: tuple[float, float] | None = None
    note: str = ""
    sampled: bool | None = None
    pictures: str | None = None


def classes(only: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Kind and model type of every class of both mappings; `only` those types, where any are named."""
    found = []
    for kind, mapping in (
        ("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image-text", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        seen: set[str] = set()
        for model_type, name in mapping.items():
            single = name if isinstance(name, str) else name[0]
            if (not only or model_type in only) and single not in seen:
                seen.add(single)
                found.append((kind, model_type))
    return found


def measure(kind: str, model_type: str) -> Finding:
    """One class, at most `SECONDS` long."""
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForImageTextToText
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind == "causal" else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    named = mapping[model_type]
    name = named if isinstance(named, str) else named[0]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        model = tiny_model(model_type, auto)
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            return Finding(kind, model_type, name, UNBUILT, note="it stays large")
    except BaseException as error:
        return Finding(kind, model_type, name, UNBUILT, note=_line(error))
    else:
        found = _compared(model, kind, model_type)
    finally:
        signal.alarm(0)
    return found if kind == "causal" else _with_pictures(found, auto)


def _with_pictures(found: Finding, auto: Any) -> Finding:
    signal.alarm(SECONDS)
    try:
        pictures, said = see(found.model_type, auto)
    except TimeoutError as error:
        pictures, said = None, str(error)
    finally:
        signal.alarm(0)
    more = [f"with pictures: {_line(ValueError(said))}"] if pictures is not None and said else []
    return replace(found, pictures=pictures, note="; ".join([*([found.note] if found.note else []), *more]))


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def _compared(model: Any, kind: str, model_type: str) -> Finding:
    name = type(model).__name__
    passes: list[float] = []
    told: set[str] = set()
    try:
        check_generate(model)
    except ValueError as error:
        return Finding(kind, model_type, name, *_unassisted(model, error))
    for rows in (1, 3):
        inputs = {**prompts(rows), "max_new_tokens": NEW, "do_sample": False}
        try:
            plain = model.generate(**inputs)
        except BaseException as error:
            return Finding(kind, model_type, name, NO_PLAIN, note=_line(error))
        for chain in (
            [noisy(model, 0.0)],
            [noisy(model, NOISE[1])],
            [noisy(model, NOISE[0]), noisy(model, NOISE[1], seed=2)],
        ):
            try:
                found = generate(
                    model,
                    **inputs,
                    assistant_models=chain,
                    num_assistant_tokens=DRAFT,
                    return_dict_in_generate=True,
                )
            except (ValueError, LevelError, RollbackError) as error:
                refused = isinstance(error, ValueError)
                return Finding(kind, model_type, name, REFUSED if refused else CRASHED, note=_line(error))
            except BaseException as error:
                return Finding(kind, model_type, name, CRASHED, note=_line(error))
            if not hasattr(found, "polyspec"):
                return Finding(kind, model_type, name, CRASHED, note="generate() passed the chain by")
            if found.sequences.tolist() != plain.tolist():
                what = f"{rows} row{'s' if rows > 1 else ''}, a chain of {1 + len(chain)}"
                return Finding(kind, model_type, name, DIFFERENT, note=what)
            if len(passes) < (1 if rows == 1 else 2):
                passes.append(found.polyspec.levels[0].forward_passes / NEW)
            notes = found.polyspec.levels[0].notes
            told.update("rows run in step" for note in notes if "in step" in note)
            told.update(_line(ValueError(note.removesuffix(ALONE))) for note in notes if note.endswith(ALONE))
    verdict = EQUAL if max(passes) <= WORTH else GAINLESS
    said = "; ".join(sorted(told))
    return Finding(kind, model_type, name, verdict, (passes[0], passes[1]), said, _sampled_alike(model))


def _unassisted(model: Any, reason: ValueError) -> tuple[str, None, str]:
    """The verdict of a class with a generate() of its own, and a note."""
    inputs = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    made = []
    for given in ({}, {"assistant_models": [noisy(model, NOISE[1])]}):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)  # some draw whatever they are told
            try:
                text = generate(model, **inputs, **given)
            except BaseException as error:
                return (CRASHED if given else NO_PLAIN), None, _line(error)
        made.append(getattr(text, "sequences", text).tolist())
    return GAINLESS if made[0] == made[1] else DIFFERENT, None, _line(reason)


def _sampled_alike(model: Any) -> bool:
    """Whether a text that is drawn under a seed is the one that plain generate() draws."""
    inputs = {**prompts(1), "max_new_tokens": NEW, "do_sample": True, "top_k": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        plain = model.generate(**inputs)
        torch.manual_seed(7)
        return bool(
            generate(model, **inputs, assistant_models=[noisy(model, NOISE[1])], num_assistant_tokens=DRAFT).tolist()
            == plain.tolist()
        )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).replace("|", "\\|") or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def page(findings: Sequence[Finding]) -> str:
    """docs/architectures.md."""
    lines = [
        "# Architectures",
        "",
        f"What `polyspec measure architectures` says on transformers {installed()}: every class of the causal-LM and",
        "of the image-text mapping, built tiny and random, in float32. Greedy text of chains of two (an exact copy, a",
        "noisy one) and of three is compared, token for token, with plain `generate()`'s, for one prompt and for a",
        "left-padded batch of three, on text alone. Passes are those of the target for each token with an exact copy",
        f"that drafts {DRAFT}, for one row and for three; plain generation's are 1. Sampled: whether a text of",
        "a chain of two, drawn under a seed, is the one that plain `generate()` draws. Pictures: the same with a",
        "picture of random numbers in each prompt, where a form was found that the class takes: a row, three padded",
        "ones, a suffix drafter, and two texts for each of two prompts, sampled.",
        "",
        f"Made with torch {torch.__version__} on a CPU ({platform.machine()}), {time.strftime('%Y-%m-%d')}.",
        "",
        "| verdict | causal | image-text | |",
        "| --- | --- | --- | --- |",
    ]
    for verdict, meaning in VERDICTS.items():
        counts = [sum(f.kind == kind and f.verdict == verdict for f in findings) for kind in ("causal", "image-text")]
        lines.append(f"| {verdict} | {counts[0]} | {counts[1]} | {meaning} |")
    looked = Counter(f.pictures for f in findings if f.pictures is not None)
    lines += ["", f"With pictures: {', '.join(f'{count} {word}' for word, count in looked.most_common()) or 'none'}."]
    for kind, title in (("causal", "Causal LMs"), ("image-text", "Image-text models")):
        seeing = kind == "image-text"
        columns = ["class", "`model_type`", "verdict", "passes", "sampled", *(["pictures"] if seeing else [])]
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} | |", "| --- " * (len(columns) + 1) + "|"]
        for f in sorted((f for f in findings if f.kind == kind), key=lambda f: f.name.lower()):
            ratio = "" if f.passes is None else f"{f.passes[0]:.2f}, {f.passes[1]:.2f}"
            drawn = {None: "", True: "same", False: "other"}[f.sampled]
            seen = f" {f.pictures or ''} |" if seeing else ""
            lines.append(f"| {f.name} | `{f.model_type}` | {f.verdict} | {ratio} | {drawn} |{seen} {f.note} |")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def read(path: Path) -> list[Finding]:
    """What a file of findings holds, of every class the last one."""
    found: dict[tuple[str, str], Finding] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        passes = values.pop("passes")
        one = Finding(**values, passes=None if passes is None else (passes[0], passes[1]))
        found[one.kind, one.model_type] = one
    return list(found.values())


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 1/4")
    return int(part), int(parts)


def _bounded() -> None:
    """A class that would fill the machine's memory fails instead, and no other process is ended for it."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _one(asked: tuple[str, str]) -> Finding:
    return measure(*asked)


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print what is not equal, and write the page if asked."""
    parser = argparse.ArgumentParser("polyspec measure architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="model types; left out, all of the installed release")
    parser.add_argument("--jobs", type=arguments.count, default=1, help="processes")
    parser.add_argument("--page", type=Path, help="write the page here, such as docs/architectures.md")
    parser.add_argument("--part", type=_part, default=(1, 1), help="which part of all, such as 1/4")
    parser.add_argument("--findings", type=Path, help="a file that every finding is added to, and the page made of")
    given = parser.parse_args(words)
    part, parts = given.part
    asked = classes(given.only)[part - 1 :: parts]
    if not asked:
        parser.error(f"--only: there is no class for {', '.join(given.only)} in transformers {installed()}.")
    quiet(errors_only=True)
    started = time.perf_counter()
    findings = []
    # Each in a process of its own: a crash of one is no end of the others, and memory is given back.
    with multiprocessing.get_context("fork").Pool(given.jobs, _bounded, maxtasksperchild=20) as pool:
        for found in pool.imap(_one, asked):
            findings.append(found)
            if given.findings is not None:
                with given.findings.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
            print(
                f"{found.kind:10} {found.model_type:28} {found.verdict:20} {found.passes or ''} {found.note}",
                flush=True,
            )
    counts = ", ".join(f"{v} {sum(f.verdict == v for f in findings)}" for v in VERDICTS)
    print(f"{len(findings)} classes in {time.perf_counter() - started:.0f} s: {counts}", file=sys.stderr)
    if given.page is not None:
        if given.findings is not None:
            findings = read(given.findings)
        given.page.write_text(page(findings), encoding="utf-8")
