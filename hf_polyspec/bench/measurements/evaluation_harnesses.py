# SPDX-License-Identifier: Apache-2.0
"""A task that generates, in each evaluation harness that `polyspec measure evaluation` runs; imported where used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

NAME = "polyspec_questions"
UNTIL = "Question:"
"""Ends an answer, as tasks with examples in the prompt have it."""


@dataclass(frozen=True)
class Answers:
    """Of one evaluation.

    Attributes:
        texts: of every sample, in the order of the task.
        tokens: that a chain generated; passes: of the target, rows counted one by one. 0 of a model without a chain.
        ids: of every sample, those that the model was given and those that it wrote, an end and what follows included;
            none where a harness does not tell them.
    """

    texts: tuple[str, ...]
    tokens: int
    passes: int
    ids: tuple[tuple[list[int], list[int]], ...] = ()


class Harness(Protocol):
    """A harness with a task in it."""

    def model(self, model: Any, tokenizer: Any, chain: str | None, batch: int) -> Any:
        """Its own model around one that is loaded, or ours with a chain (names with commas between) below it."""
        raise NotImplementedError

    def evaluate(self, model: Any) -> Answers:
        """What a `model` answers."""
        raise NotImplementedError


class LmEval:
    """lm-evaluation-harness.

    Args:
        questions: of the task; new_tokens: of an answer, at most; folder: for the task's files.
    """

    def __init__(self, questions: Sequence[str], new_tokens: int, folder: Path) -> None:
        from lm_eval.tasks import TaskManager

        lines = (json.dumps({"question": text, "answer": ""}) for text in questions)
        (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
        task = {
            "task": NAME, "dataset_path": "json", "test_split": "train", "output_type": "generate_until",
            "dataset_kwargs": {"data_files": str(folder / "questions.jsonl"), "cache_dir": str(folder / "datasets")},
            "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [UNTIL], "max_gen_toks": new_tokens, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }  # fmt: skip
        (folder / f"{NAME}.yaml").write_text(json.dumps(task))  # which is YAML too
        self._tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def model(self, model: Any, tokenizer: Any, chain: str | None, batch: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        from ...integrations.lm_eval import PolySpecLM

        how: dict[str, Any] = {"pretrained": model, "tokenizer": tokenizer, "batch_size": batch}
        made = HFLM(**how) if chain is None else PolySpecLM(**how, assistants=chain.replace(",", "+"))
        _note(made)
        return made

    def evaluate(self, model: Any) -> Answers:
        import lm_eval

        before = _counts(model)
        found = lm_eval.simple_evaluate(
            model=model, tasks=[NAME], task_manager=self._tasks, bootstrap_iters=0,
            apply_chat_template=bool(model.tokenizer.chat_template),
        )  # fmt: skip
        samples = sorted(found["samples"][NAME], key=lambda each: int(each["doc_id"]))
        texts = tuple(each["resps"][0][0] for each in samples)
        return Answers(texts, *_since(model, before), tuple(model.noted[_asked(each)] for each in samples))


def _note(model: Any) -> None:
    """Has an lm-eval model keep the ids of every generation, by its context: `noted`."""
    encode, generate = model.tok_batch_encode, model._model_generate
    model.noted = {}
    contexts: list[str] = []

    def encoded(strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        contexts[:] = strings
        return encode(strings, *args, **kwargs)

    def generated(context: Any, attention_mask: Any, **kwargs: Any) -> Any:
        written = generate(context=context, attention_mask=attention_mask, **kwargs)
        given = [row[mask.bool()].tolist() for row, mask in zip(context, attention_mask, strict=True)]
        new = written[:, context.shape[1] :].tolist()
        model.noted.update(zip(contexts, zip(given, new, strict=True), strict=True))
        return written

    model.tok_batch_encode, model._model_generate = encoded, generated


def _asked(sample: dict[str, Any]) -> str:
    """The context of an lm-eval sample of one generation."""
    [(context, _)] = sample["arguments"]
    return str(context)


class LightEval:
    """lighteval: its model's answers to a task's documents, without the scores.

    Args:
        questions, new_tokens, folder: as of `LmEval`.
    """

    def __init__(self, questions: Sequence[str], new_tokens: int, folder: Path) -> None:
        from lighteval.tasks.requests import Doc

        self._docs = [
            Doc(
                task_name=NAME,
                query=text,
                choices=[""],
                gold_index=0,
                id=str(place),
                generation_size=new_tokens,
                stop_sequences=[UNTIL],
            )
            for place, text in enumerate(questions)
        ]
        self._folder = folder

    def model(self, model: Any, tokenizer: Any, chain: str | None, batch: int) -> Any:
        from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig

        from ...integrations.lighteval import PolySpecConfig, PolySpecModel

        how: dict[str, Any] = {
            "model_name": tokenizer.name_or_path,
            "batch_size": batch,
            "cache_dir": str(self._folder),
        }
        how["device"] = str(model.device)
        made: Any
        if chain is None:
            made = TransformersModel.from_model(model, TransformersModelConfig(**how))
        else:
            made = PolySpecModel.from_model(model, PolySpecConfig(**how, assistants=chain.replace(",", "+")))
        made._cache = None  # it would answer the second time from what it kept of the first
        return made

    def evaluate(self, model: Any) -> Answers:
        before = _counts(model)
        answers = model.greedy_until(self._docs)
        return Answers(tuple(answer.text[0] for answer in answers), *_since(model, before))


def _counts(model: Any) -> tuple[int, int]:
    return getattr(model, "tokens", 0), getattr(model, "passes", 0)


def _since(model: Any, before: tuple[int, int]) -> tuple[int, int]:
    tokens, passes = _counts(model)
    return tokens - before[0], passes - before[1]


class Known(NamedTuple):
    """A harness by its name.

    Attributes:
        make: a class; package: that it needs; extra: of this project, which brings it.
    """

    make: Any
    package: str
    extra: str


HARNESSES = {"lm-eval": Known(LmEval, "lm_eval", "eval"), "lighteval": Known(LightEval, "lighteval", "lighteval")}
