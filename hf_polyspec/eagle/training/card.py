# SPDX-License-Identifier: Apache-2.0
"""The finished head's folder: weights, card, config and curve side by side."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.config import TrainingConfig
from hf_polyspec.eagle.training.curve import read_curve, read_validations
from hf_polyspec.eagle.training.dataset import Corpus
from hf_polyspec.eagle.training.losses import OBJECTIVES
from hf_polyspec.eagle.training.shards import GREEDY, read_provenance
from hf_polyspec.exactness.processors import rank_tokens
from hf_polyspec.models.packaged import PACKAGE
from hf_polyspec.storage.folders import filling

# a working vocabulary larger than this costs more than it brings
_MOST_FREQUENT = 32_000
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class RunFacts:
    """What a card tells about a run beyond its config.

    Args:
        steps: optimizer steps.
        tokens: training tokens used, repetitions counted.
        seconds: time spent training.
        device: what it ran on, in words.
        processes: how many shared the work.
    """

    steps: int
    tokens: int
    seconds: float
    device: str
    processes: int


def publish(
    head: EagleHead,
    config: TrainingConfig,
    corpus: Corpus,
    acceptance: Mapping[str, Mapping[str, Any]],
    facts: RunFacts,
    dtype: str = "float16",
) -> Path:
    """Writes the finished head with everything a reader needs to judge and repeat it.

    Args:
        head: the trained head.
        config: the run.
        corpus: the texts.
        acceptance: held-out acceptance by kind of text.
        facts: of the run.
        dtype: of the stored weights.

    Returns:
        The folder, whose files appear together, config.json last: `model.safetensors`, `config.json`, `training.yaml`,
        `curve.csv`, `curve.png`, `validation.jsonl` and `README.md`.

    Raises:
        ValueError: the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    folder = config.folder / "head"
    remember_frequent(head, corpus)
    with filling(folder) as place:
        before = head.dtype
        # there and back is exact for nothing that is trained on afterwards: the run is over
        head.to(DTYPES[dtype]).save_pretrained(place)
        head.to(before)
        config.save(place / "training.yaml")
        for name in ("curve.csv", "validation.jsonl"):
            if (config.folder / name).is_file():
                shutil.copyfile(config.folder / name, place / name)
        draw_curve(place)
        card = card_text(head, config, corpus, acceptance, facts, dtype)
        (place / "README.md").write_text(card, encoding="utf-8")
    return folder


def card_text(
    head: EagleHead,
    config: TrainingConfig,
    corpus: Corpus,
    acceptance: Mapping[str, Mapping[str, Any]],
    facts: RunFacts,
    dtype: str,
) -> str:
    """The card, in Markdown with a Hub header; arguments as for `publish`."""
    name = Path(config.target).name if Path(config.target).is_absolute() else config.target
    weights = sum(weight.numel() for weight in head.parameters())
    header = ["---", "library_name: hf_polyspec", "tags: [speculative-decoding, eagle]"]
    if config.target != PACKAGE and not Path(config.target).exists():
        header.append(f"base_model: {name}")
    plan = config.optimization
    lines = [
        *header,
        "---",
        "",
        f"# {head.config.algorithm.upper().replace('EAGLE', 'EAGLE-')} draft head for {name}",
        "",
        f"{weights / 1e6:.1f} M weights in {dtype}; the embedding"
        + (" is" if head.config.own_lm_head else " and the output layer are")
        + f" the target's. Scores {head.config.draft_vocab_size} of {head.config.vocab_size} ids.",
        "",
        "## Data",
        "",
        *_data_lines(config, corpus),
        "",
        "## Training",
        "",
        "| | |",
        "| --- | --- |",
        f"| optimizer steps | {facts.steps} |",
        f"| tokens seen, repetitions counted | {facts.tokens:,} |",
        f"| epochs | {plan.epochs} |",
        f"| draft steps unrolled | {plan.steps if head.config.algorithm == 'eagle3' else 1} |",
        f"| learning rate | {plan.learning_rate:g}, {plan.warmup_steps} warm-up steps, {plan.schedule} |",
        f"| time | {facts.seconds / 3600:.2f} hours |",
        f"| hardware | {facts.device}, {facts.processes} process{'es' if facts.processes > 1 else ''} |",
        f"| features and teacher from | {_who(config.reader)} |",
        *([f"| started from | {Path(config.init_from).name} |"] if config.init_from else []),
        "",
        "`training.yaml` repeats the run; `curve.csv` and `curve.png` show it.",
        "",
        *_acceptance_lines(acceptance),
    ]
    return "\n".join(lines) + "\n"


def remember_frequent(head: EagleHead, corpus: Corpus) -> None:
    """Keeps in the head's config which of the ids it scores the texts use most, the commonest first.

    Args:
        head: the trained head.
        corpus: the texts.
    """
    scored = set(head.target_ids().tolist())
    ranked = rank_tokens(text.tokens.tolist() for text in corpus.train)
    head.config.frequent_tokens = [token for token in ranked if token in scored][:_MOST_FREQUENT]


def draw_curve(folder: Path) -> Path | None:
    """Draws loss and acceptance over steps.

    Args:
        folder: holds `curve.csv`, perhaps `validation.jsonl`; gets `curve.png`.

    Returns:
        The picture, or None when there is no curve or matplotlib is not installed.
    """
    rows = read_curve(folder / "curve.csv")
    if not rows:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [int(row["step"]) for row in rows]
    for column, (objective, number) in ((name, name.rsplit("_", 1)) for name in rows[0] if "_" in name):
        if objective in OBJECTIVES:
            label = f"draft step {int(number) + 1}"
            left.plot(steps, [float(row[column]) for row in rows], label=label, linewidth=1)
            left.set(xlabel="optimizer step", ylabel=objective.replace("_", " ") + " (nats)")
    left.legend()
    records = read_validations(folder / "validation.jsonl")
    if records:
        for kind in (f"{learned}{name}" for name in ("greedy", "sampled") for learned in ("", "learned_")):
            points = [(r["step"], r[kind]["mean_acceptance_length"]) for r in records if kind in r]
            if points:
                right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind.replace("_", " "))
        right.set(xlabel="optimizer step", ylabel="tokens a pass (chain)")
        right.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    return folder / "curve.png"


def _data_lines(config: TrainingConfig, corpus: Corpus) -> list[str]:
    texts = [*corpus.train, *corpus.validation]
    greedy = sum(text.kind == GREEDY for text in texts)
    tokens = sum(len(text) for text in corpus.train)
    facts = [fact for folder in config.texts_folders for fact in read_provenance(folder)]
    origin = "; ".join(dict.fromkeys(fact.get("prompts", "unknown") for fact in facts))
    writer = _who("int8" if any(fact.get("writer") == "int8" for fact in facts) else "target")
    return [
        f"Self-generated: {len(corpus.train)} texts of {tokens:,} tokens ({corpus.answer_tokens():,} in answers) to "
        f"learn from, {len(corpus.validation)} held out. Prompts: {origin}. Answers by {writer}: {greedy} greedy, "
        f"{len(texts) - greedy} sampled.",
    ]


def _who(name: str) -> str:
    return "an int8 copy of the target" if name == "int8" else "the target itself"


def _acceptance_lines(acceptance: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["## Acceptance", "", "On the answers of texts, held out but for those called learned.", ""]
    for kind, found in acceptance.items():
        chain = found["chain"]
        lines += [
            f"### {kind.replace('_', ' ')} texts ({found['rows']} positions)",
            "",
            "| draft position | " + " | ".join(str(index + 1) for index in range(len(chain))) + " |",
            "| --- |" + " --- |" * len(chain),
            "| accepted, all before it accepted | " + " | ".join(f"{rate:.3f}" for rate in chain) + " |",
        ]
        for key in (key for key in found if key.startswith("top")):
            label = f"among the first {key[3:]}, true path given"
            lines.append(f"| {label} | " + " | ".join(f"{rate:.3f}" for rate in found[key]) + " |")
        length = f"{found['mean_acceptance_length']:.2f}"
        lines += ["", f"Decoding with chains of {len(chain)}: {length} tokens a pass, bonus included.", ""]
    return lines
