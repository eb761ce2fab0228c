# SPDX-License-Identifier: Apache-2.0
"""Scoring bench outputs: values against the libraries, sources told plainly, nothing lost silently."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import sacrebleu
import typer
from rouge_score.rouge_scorer import RougeScorer
from typer.testing import CliRunner

from hf_polyspec.metrics import scorers as scorers_module
from hf_polyspec.metrics.command import score_command
from hf_polyspec.metrics.records import Record, parse_record, read_records
from hf_polyspec.metrics.report import to_json, to_markdown
from hf_polyspec.metrics.scorers import bleu, grade_school_math, question_answering, rouge
from hf_polyspec.metrics.scoring import ALL_TASKS, ScoreReport, score_records

SENTENCE = "the cat sat on a mat and saw two dogs run over green hills in the rain"
WORDS = SENTENCE.split()
TASKS = ("translation", "summarization", "qa", "rag", "math_reasoning", "mt_bench")

STAND_IN = """
import datasets
import evaluate

class StandIn(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": REFERENCES}))

    def _compute(self, predictions, references, **options):
        return RESULT
"""


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Community modules can only come from a local folder, wherever the tests run."""
    load = evaluate.load

    def local_only(path: str, *args: Any, **kwargs: Any) -> Any:
        if not Path(path).exists():
            raise FileNotFoundError(path)
        return load(path, *args, **kwargs)

    monkeypatch.setattr(evaluate, "load", local_only)


def record(task: str, question: int, method: str, output: str, **changes: Any) -> Record:
    reference = "so 3 + 4 = 7\n#### 7" if task == "math_reasoning" else " ".join(WORDS[:9])
    ids = tuple(map(ord, output))
    made = Record(str(question), task, task, method, 0.0, 0, output, ids, (reference,))
    return replace(made, **changes)


def outputs(task: str, seed: int, n: int = 12) -> list[str]:
    rng = np.random.default_rng(seed)
    if task == "math_reasoning":
        return [f"the answer is {rng.integers(6, 8)}" for _ in range(n)]
    return [" ".join(rng.choice(WORDS, 9)) if rng.random() < 0.3 else " ".join(WORDS[: 5 + i % 8]) for i in range(n)]


def run(method_seed: int, **changes: Any) -> list[Record]:
    return [
        record(task, 100 * t + i, method, text, **changes)
        for t, task in enumerate(TASKS)
        for method, seed in (("plain", 0), ("polyspec", method_seed))
        for i, text in enumerate(outputs(task, seed))
    ]


def score(records: list[Record], **options: Any) -> ScoreReport:
    return score_records(records, n_resamples=200, **options)


def test_equal_outputs_are_the_same_everywhere() -> None:
    report = score(run(0))
    assert {row.task for row in report.quality} == set(TASKS) - {"mt_bench"}
    assert all(row.result.difference == 0 and row.adjusted_p == 1.0 for row in report.quality)
    assert {row.task for row in report.tokens} == {*TASKS, ALL_TASKS}
    assert all(row.identical_rate == 1.0 for row in report.tokens)
    assert any(note.startswith("mt_bench: no metric") for note in report.notes)


def test_corpus_scores_equal_the_libraries() -> None:
    report = score(run(1))
    found = {(row.task, row.metric): row.result for row in report.quality}
    reference = " ".join(WORDS[:9])
    texts = outputs("translation", 1)
    wanted = sacrebleu.corpus_bleu(texts, [[reference] * len(texts)]).score
    assert found["translation", "BLEU"].method == pytest.approx(wanted)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = outputs("summarization", 1)
    wanted = np.mean([scorer.score(reference, text)["rougeL"].fmeasure for text in texts]) * 100
    assert found["summarization", "ROUGE-L"].method == pytest.approx(wanted)
    wanted = np.mean([text.endswith("7") for text in outputs("math_reasoning", 0)]) * 100
    assert found["math_reasoning", "exact match (final number)"].baseline == pytest.approx(wanted)
    assert found["math_reasoning", "exact match (####)"].baseline == 0.0


def test_offline_sources_are_told() -> None:
    sources = score(run(0)).sources
    assert "cannot be had offline" in sources["BLEU"]
    assert "sacrebleu" in sources["BLEU"]
    assert "rouge_score" in sources["ROUGE"]
    assert "SQuAD's published rules" in sources["QA"]
    assert "compared here" in sources["GSM8K"]


def stand_in(folder: Path, name: str, references: str, result: str) -> None:
    (folder / name).mkdir()
    code = STAND_IN.replace("REFERENCES", references).replace("RESULT", result)
    (folder / name / f"{name}.py").write_text(code)


def test_local_evaluate_modules_are_used(tmp_path: Path) -> None:
    many = 'datasets.Sequence(datasets.Value("string"))'
    stand_in(
        tmp_path,
        "sacrebleu",
        many,
        '{"counts": [4, 3, 2, 1], "totals": [5, 4, 3, 2], "sys_len": 5, "ref_len": 6}',
    )
    stand_in(
        tmp_path,
        "rouge",
        many,
        '{"rouge1": [0.5], "rouge2": [0.25], "rougeL": [options["use_stemmer"] * 0.1]}',
    )
    stand_in(
        tmp_path,
        "exact_match",
        'datasets.Value("string")',
        '{"exact_match": predictions[0] == references[0]}',
    )
    assert bleu(tmp_path).measure("a", ["b"]) == [4, 3, 2, 1, 5, 4, 3, 2, 5, 6]
    assert rouge(tmp_path).measure("a", ["b"]) == pytest.approx([0.5, 0.25, 0.1])
    assert grade_school_math(tmp_path).measure("so 7", ["#### 7"]) == [0.0, 1.0]
    assert question_answering(tmp_path).source.endswith("published rules here")  # no squad in the folder
    assert str(tmp_path) in rouge(tmp_path).source


def test_local_squad_module(tmp_path: Path) -> None:
    (tmp_path / "squad").mkdir()
    code = STAND_IN.replace('datasets.Value("string"), "references"', 'P, "references"')
    code = code.replace("REFERENCES", "R").replace("RESULT", '{"exact_match": 0.0, "f1": 50.0}')
    head = (
        'import datasets\ns = datasets.Value("string")\nP = {"id": s, "prediction_text": s}\n'
        'R = {"id": s, "answers": datasets.Sequence({"text": s, "answer_start": datasets.Value("int32")})}\n'
    )
    (tmp_path / "squad" / "squad.py").write_text(head + code)
    assert question_answering(tmp_path).measure("it was Dean", ["Dean"]) == [0.0, 0.5, 1.0]


def test_metrics_that_cannot_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    report = score(run(0))
    assert {row.task for row in report.quality} == {"qa", "rag", "math_reasoning"}
    assert any("summarization: not scored" in note and "pip install rouge_score" in note for note in report.notes)
    assert any("translation: not scored" in note and "pip install sacrebleu" in note for note in report.notes)


def test_without_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "evaluate", None)
    report = score(run(0))
    assert len({row.task for row in report.quality}) == 5
    assert not report.tokens
    assert any("pip install evaluate" in note for note in report.notes)


def test_worse_answers_are_called_different() -> None:
    records = [
        record("math_reasoning", i, method, f"#### {7 if method == 'plain' else 8}")
        for i in range(12)
        for method in ("plain", "polyspec")
    ]
    report = score(records)
    strict = next(row for row in report.quality if "####" in row.metric)
    assert strict.result.difference == -100.0
    assert json.loads(to_json(report))["quality"][0]["verdict"] == "differs"
    assert "2 after Holm's correction" in to_markdown(report)
    assert report.tokens[0].identical_rate == 0.0
    assert report.tokens[0].first_differences[0] == ("0", 0, 5)


def test_sampled_answers_are_compared_in_law() -> None:
    rng = np.random.default_rng(0)

    def answers(method: str, low: int, high: int) -> list[Record]:
        return [
            record("qa", i, method, "x", temperature=1.0, output_ids=tuple(rng.integers(low, high, 20).tolist()))
            for i in range(30)
        ]

    report = score(answers("plain", 0, 9) + answers("right", 0, 9) + answers("wrong", 0, 7))
    p_values = {row.method: row.p_value for row in report.tokens}
    assert p_values["right"] > 0.01
    assert p_values["wrong"] == pytest.approx(0.001)


def test_left_out_answers_are_counted() -> None:
    records = run(0)
    records.remove(next(r for r in records if r.task == "qa" and r.method == "polyspec"))
    records = [replace(r, references=()) if r.question_id == "0" else r for r in records]
    report = score(records)
    assert any("qa" in note and "1 answers are only in one" in note for note in report.notes)
    assert any("translation" in note and "1 of 12 answers have no usable reference" in note for note in report.notes)
    n = {row.task: row.result.n_questions for row in report.quality}
    assert (n["qa"], n["translation"], n["rag"]) == (11, 11, 12)


def test_repeated_samples_of_a_question_are_averaged() -> None:
    records = [record("math_reasoning", i, "plain", "7") for i in range(6)]
    records += [record("math_reasoning", i, "polyspec", text) for i in range(6) for text in ("7", "8")]
    row = next(row for row in score(records).quality if "final" in row.metric)
    assert (row.result.baseline, row.result.method, row.result.n_questions) == (100.0, 50.0, 6)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (run(0), {"baseline": "vanilla"}, "'vanilla'; there are plain, polyspec"),
        (run(0)[:3], {}, "nothing to compare it with"),
        (run(0), {"confidence": 95}, "confidence must lie between 0 and 1"),
    ],
)
def test_refusals(records: list[Record], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(records, **options)


FIELDS: dict[str, Any] = {
    "question_id": 485, "category": "rag", "task": "rag", "method": "plain", "temperature": 0,
    "turn": 0, "output": "914 mbar", "output_ids": [5, 6], "references": [["914 mbar ( hPa )"]],
}  # fmt: skip


def test_records_are_read_and_nested_references_flattened() -> None:
    found = parse_record(FIELDS, "here")
    assert found.references == ("914 mbar ( hPa )",)
    assert found.question_id == "485"
    assert parse_record({**FIELDS, "references": None}, "here").references == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": True}, "temperature must be"),
        ({"output": None}, "output must be a string"),
        ({"output_ids": [1.5]}, "output_ids must be"),
        ({"turn": "0"}, "turn must be"),
        ({"references": [3]}, "references must be"),
    ],
)
def test_bad_records(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"x.jsonl, line 3: {message}"):
        parse_record({**FIELDS, **changes}, "x.jsonl, line 3")


def test_files(tmp_path: Path) -> None:
    whole, torn = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    line = json.dumps(FIELDS)
    whole.write_text(f"{line}\n\n{line}\n")
    torn.write_text(f"{line}\n{line[:40]}")
    records, notes = read_records([whole, torn])
    assert len(records) == 3
    assert notes == ["b.jsonl: the last line is cut off and was left out."]
    torn.write_bytes(f"{line}\n".encode() + '{"output": "ä'.encode()[:-1])  # in the middle of a character
    assert len(read_records([torn])[0]) == 1
    torn.write_text(f"{line[:40]}\n{line}\n")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: not JSON"):
        read_records([torn])
    torn.write_text(json.dumps({"task": "qa"}))
    with pytest.raises(ValueError, match="line 1: the field 'question_id' is missing"):
        read_records([torn])
    torn.write_text("")
    with pytest.raises(ValueError, match="no records"):
        read_records([torn])


def application() -> typer.Typer:
    app = typer.Typer()
    app.command("score")(score_command)
    return app


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(r.__dict__) + "\n" for r in run(1)))
    arguments = [str(file), "--resamples", "100", "--modules", str(tmp_path)]
    for suffix in (".json", ".md"):
        found = CliRunner().invoke(application(), [*arguments, "--output", str(tmp_path / f"r{suffix}")])
        assert found.exit_code == 0, found.output
    assert "Token ids against plain" in found.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["quality"]) == 1 + 3 + 3 + 3 + 2
    assert "| translation | 0 | BLEU | 12 |" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("extra", [["--output", "r.html"], ["--baseline", "vanilla"], ["--resamples", "1"]])
def test_command_refuses_in_a_sentence(tmp_path: Path, extra: list[str]) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(r.__dict__) + "\n" for r in run(1)))
    found = CliRunner().invoke(application(), [str(file), *extra])
    assert found.exit_code == 2
    assert "Traceback" not in found.output


def test_same_community_module_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    find = scorers_module.find_module

    def counting(name: str, folder: Path | None) -> tuple[Any, str]:
        asked.append(name)
        return find(name, folder)

    monkeypatch.setattr(scorers_module, "find_module", counting)
    score(run(0))
    assert sorted(asked) == ["exact_match", "rouge", "sacrebleu", "squad"]
