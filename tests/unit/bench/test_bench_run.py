# SPDX-License-Identifier: Apache-2.0
"""Whole runs with tiny models: interleaved, resumable, shared, and fit to be scored."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_support import bench, run_arguments
from torch.autograd import DeviceType
from typer.testing import CliRunner

from hf_polyspec.bench import command
from hf_polyspec.bench.breakdown import shares
from hf_polyspec.bench.cast import Cast
from hf_polyspec.bench.journal import read_lines
from hf_polyspec.bench.request import Asked, spelled
from hf_polyspec.bench.runner import Share
from hf_polyspec.cli import app
from hf_polyspec.metrics.records import read_records
from hf_polyspec.storage.locks import one_writer

VOLATILE = ("seconds", "peak_bytes", "rise_bytes", "levels")
CHAIN = "polyspec:small,suffix@block=4,draft=3"


PART = ("--tasks", "mt_bench,qa", "--no-breakdown")
"""Two tasks are enough where a run is made again."""


def answers(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The records of those tasks without their timings, by what they answer."""
    found = {}
    for line in read_lines(folder, "records"):
        if line["task"] not in ("mt_bench", "qa"):
            continue
        key = (line["method"], line["temperature"], line["group"], line["turn"], line["row"])
        found[key] = {name: value for name, value in line.items() if name not in VOLATILE}
    return found


def test_every_method_answers_every_turn_and_says_the_same(bench_run: Path) -> None:
    lines = read_lines(bench_run, "records")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_method.setdefault(line["method"], []).append(line)
    batched = [name for name in by_method if name.endswith("batch=2")]
    assert sorted(batched) == [f"plain@batch={2}", f"{CHAIN},batch=2"]
    assert {name: len(found) for name, found in by_method.items()} == dict.fromkeys(by_method, 7)
    plain = {(line["question_id"], line["turn"]): line["output_ids"] for line in by_method["plain"]}
    for line in lines:
        # The models are in float32, where only exact ties could differ, and random logits have none.
        assert line["output_ids"] == plain[line["question_id"], line["turn"]], line["method"]
    assert all(not line["differences"] for line in read_lines(bench_run, "ties"))


def test_records_carry_what_happened(bench_run: Path) -> None:
    chain = [line for line in read_lines(bench_run, "records") if line["method"] == CHAIN]
    assert [level["name"] for level in chain[0]["levels"]] == ["target", "small", "suffix"]
    for line in chain:
        assert line["seconds"] > 0
        assert line["target_passes"] < line["new_tokens"]
        assert {level for level, _ in line["pieces"]} <= {0, 1, 2}
    assert any(level == 1 for line in chain for level, _ in line["pieces"])
    assisted = [line for line in read_lines(bench_run, "records") if line["method"] == "hf:assisted:small"]
    assert all(1 <= line["target_passes"] <= line["new_tokens"] for line in assisted)
    assert any(line["target_passes"] < line["new_tokens"] for line in assisted)


def test_methods_take_turns_prompt_by_prompt(bench_run: Path) -> None:
    lines = [line for line in read_lines(bench_run, "records") if line["batch_size"] == 1]
    prompts = [(line["group"], line["turn"]) for line in lines]
    orders = [[line["method"] for line in lines[i : i + 4]] for i in range(0, len(lines), 4)]
    assert all(len({prompts[i + j] for j in range(4)}) == 1 for i in range(0, len(lines), 4))
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_second_turn_follows_the_methods_own_first_answer(bench_run: Path) -> None:
    lines = [line for line in read_lines(bench_run, "records") if line["method"] == "plain" and line["turn"] == 1]
    first = [line for line in read_lines(bench_run, "records") if line["method"] == "plain" and line["turn"] == 0]
    earlier = next(line for line in first if line["question_id"] == lines[0]["question_id"])
    assert lines[0]["prompt_tokens"] > earlier["prompt_tokens"] + earlier["new_tokens"] // 2


class Killed(Exception):
    """Stands for a kill: nothing of ours handles it."""


def test_a_killed_run_goes_on_and_repeats_nothing(
    bench_models: dict[str, str], bench_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "killed"
    answer, calls = Cast.answer, [0]

    def until(limit: int) -> Any:
        def counted(self: Cast, *arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] > limit:
                raise Killed
            return answer(self, *arguments)

        return counted

    monkeypatch.setattr(Cast, "answer", until(9))
    with pytest.raises(Killed):
        bench(*run_arguments(bench_models, folder), *PART)
    path = folder / "records-0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # as if the kill had come in the middle of a write
    assert not (folder / "report.html").exists()
    calls[0] = 0
    monkeypatch.setattr(Cast, "answer", until(10_000))
    code, said = bench(*run_arguments(bench_models, folder), *PART)
    assert code == 0, said
    assert answers(folder) == answers(bench_run)
    # Three turns by four methods, and by the two that take batches; of nine answers the last was torn.
    assert len({key[:4] for key in answers(bench_run)}) == 18
    assert calls[0] == 18 - 8
    assert (folder / "report.html").exists()
    calls[0] = 0
    assert bench(*run_arguments(bench_models, folder), *PART)[0] == 0
    assert calls[0] == 0


def test_a_second_run_on_the_same_folder_is_refused(bench_models: dict[str, str], tmp_path: Path) -> None:
    with one_writer(tmp_path / "run"):
        code, said = bench(*run_arguments(bench_models, tmp_path / "run"), *PART)
    assert code == 2
    assert "Another process is writing into" in said
    assert not list((tmp_path / "run").glob("*.json*"))


def refusing(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...], rows: int, after: int = 0) -> None:
    """Have these kinds of method raise what generate() raises, for this many prompts, after so many answers."""
    answer, calls = Cast.answer, [0]

    def choosy(self: Cast, method: Any, prompts: Any, ask: Any) -> Any:
        if method.kind in kinds and len(prompts) == rows:
            calls[0] += 1
            if calls[0] > after:
                raise ValueError(f"{method.kind} needs\nanother model.")
        return answer(self, method, prompts, ask)

    monkeypatch.setattr(Cast, "answer", choosy)


def test_a_peer_that_cannot_run_is_listed_without_a_warm_up(
    bench_models: dict[str, str], bench_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "choosy"
    refusing(monkeypatch, ("hf:assisted",), rows=1)
    for _ in range(2):  # a second start goes on from there, and asks nobody again
        code, said = bench(*run_arguments(bench_models, folder), *PART)
        assert code == 0, said
    refused = [line for line in read_lines(folder, "unavailable") if "batch=2" not in line["method"]]
    assert refused == [{"method": "hf:assisted:small", "reason": "hf:assisted needs another model."}]
    others = {key: line for key, line in answers(bench_run).items() if key[0] != "hf:assisted:small"}
    assert answers(folder) == others
    assert "hf:assisted needs another model." in (folder / "report.html").read_text()


def test_a_batch_that_plain_cannot_run_is_not_compared(
    bench_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    refusing(monkeypatch, ("plain",), rows=2)
    arguments = run_arguments(bench_models, folder)
    code, said = bench(*arguments, *PART)
    assert code == 0, said
    assert "plain@batch=2 cannot be run: plain needs another model." in said
    assert {line["method"] for line in read_lines(folder, "records") if line["batch_size"] == 2} == {f"{CHAIN},batch=2"}


@pytest.mark.parametrize(("kind", "after"), [("polyspec", 0), ("hf:assisted", 1)])
def test_a_chain_that_cannot_run_or_a_peer_that_fails_later_ends_the_run(
    bench_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, after: int
) -> None:
    refusing(monkeypatch, (kind,), rows=1, after=after)
    code, said = bench(*run_arguments(bench_models, tmp_path / "run"), *PART)
    assert code == 2
    assert f"{kind} needs another model." in " ".join(said.split())
    assert not read_lines(tmp_path / "run", "unavailable")


def test_a_resumed_run_refuses_other_settings(bench_models: dict[str, str], bench_run: Path) -> None:
    before = {path.name: path.read_bytes() for path in bench_run.iterdir()}
    code, said = bench(*run_arguments(bench_models, bench_run), "--seed", "5")
    assert code == 2
    assert "was made with --seed = 0, and this one has 5" in said
    assert {path.name: path.read_bytes() for path in bench_run.iterdir()} == before


def test_processes_share_a_run_and_the_last_one_reports(
    bench_models: dict[str, str], bench_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    for rank in (1, 0):
        # As torchrun and `accelerate launch` tell a process which one it is; here one after the other.
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, said = bench(*run_arguments(bench_models, folder), *PART)
        assert code == 0, said
        assert (folder / "report.html").exists() == (rank == 0)
        assert ("has done its share" in said) == (rank == 1)
    assert sorted(path.name for path in folder.glob("records-*.jsonl")) == ["records-0.jsonl", "records-1.jsonl"]
    assert all(path.stat().st_size for path in folder.glob("records-*.jsonl"))
    assert answers(folder) == answers(bench_run)


def test_a_process_that_is_overtaken_in_float32_still_reports(
    bench_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 ends its bfloat16 part before rank 1 has begun, and its float32 part after rank 1 has ended everything."""
    arguments = [*run_arguments(bench_models, tmp_path / "run"), *PART, "--dtype", "bfloat16"]
    arguments[arguments.index("--batch-size") + 1] = "1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    load = command._in_float32
    said: list[str] = []

    def overtaken(request: Any) -> Any:
        if not said:
            said.append("")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RANK", "1")
                said[0] = bench(*arguments)[1]
        return load(request)

    monkeypatch.setattr(command, "_in_float32", overtaken)
    monkeypatch.setenv("RANK", "0")
    code, last = bench(*arguments)
    assert code == 0, last
    assert "has done its share" in said[0]
    assert "report.html" in last
    assert (tmp_path / "run" / "report.html").is_file()


def test_shares_are_disjoint_and_together_everything() -> None:
    groups: list[Any] = list(range(7))
    parts = [Share(rank, 3).take(groups) for rank in range(3)]
    assert sorted(group for part in parts for group in part) == groups
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_score_reads_the_records(bench_run: Path, tmp_path: Path) -> None:
    records, notes = read_records([bench_run / "records-0.jsonl"])
    assert not notes
    assert {record.task for record in records} == {
        "mt_bench",
        "translation",
        "summarization",
        "qa",
        "math_reasoning",
        "rag",
    }
    assert next(record for record in records if record.task == "qa").references == ("lamp", "4")


def test_the_markdown_page_has_the_tables_and_no_folders(bench_run: Path) -> None:
    page = (bench_run.parent / "page.md").read_text()
    for heading in ("### Speed-up and acceptance length, greedy", "### Speed\n", "### Memory", "### The same text"):
        assert heading in page
    assert re.search(
        r"^polyspec bench --model target --questions questions\.jsonl .*--assistant small=small --assistant suffix",
        page.replace("\\\n    ", ""),
        re.MULTILINE,
    )
    assert str(bench_run.parent) not in page
    assert "| polyspec:small,suffix@block=4,draft=3 | 7 of 7 (100%) | 0 |" in page
    assert "identical to plain-packed" not in page, "it was not run"
    assert "Not measured here" in page


def test_a_report_is_made_again_from_the_records(bench_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "again.html"
    result = CliRunner().invoke(app, ["bench-report", str(bench_run), "--html", str(page), "--texts", "1"])
    assert result.exit_code == 0, result.output
    assert page.read_text().count("<details") < (bench_run / "report.html").read_text().count("<details") + 1
    refused = CliRunner().invoke(app, ["bench-report", str(tmp_path)])
    assert refused.exit_code == 2
    assert "holds no run of polyspec bench" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--questions", "q"], "needs --model, or a --preset"),
        (["--model", "m"], "needs --questions: the file question.jsonl of the Spec-Bench repository"),
        (["--model", "m", "--questions", "q", "--temperature", "warm"], "--temperature takes numbers"),
        (["--model", "m", "--questions", "q", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--model", "m", "--questions", "q", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--model", "m", "--questions", "q", "--assistant", "a/b"], "needs a short name"),
        (["--model", "m", "--questions", "q", "--assistant", "a=x", "--assistant", "a=y"], "the name 'a' twice"),
        (["--model", "m", "--questions", "q", "--assistant", "a=auto"], "auto is no level; polyspec:auto is a method"),
        (["--model", "m", "--questions", "q", "--methods", "fast"], "a method is one of"),
        (["--model", "m", "--questions", "q", "--sweep", "block"], "--sweep takes an option"),
        (["--model", "m", "--questions", "q", "--plan", "p.json"], "There is no plan p.json"),
        (["--preset", "gpt-5", "--questions", "q"], "There is no preset 'gpt-5'"),
        (["--model", "m", "--questions", "nowhere.jsonl"], "There is no question file nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    code, said = bench(*arguments, "--output", str(tmp_path / "out"))
    assert code == 2, said
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_the_time_of_a_chain_is_split_by_level_and_kind_of_work(bench_run: Path) -> None:
    split = json.loads((bench_run / "breakdown.json").read_text())
    assert list(split) == [CHAIN]
    levels = split[CHAIN]
    assert sorted(levels) == ["0 target", "1 small", "between the levels"]
    assert sum(share for kinds in levels.values() for share in kinds.values()) == pytest.approx(1.0, abs=1e-6)
    for level in ("0 target", "1 small"):
        assert levels[level]["matrix products"] > 0
        assert levels[level]["attention"] > 0
        assert levels[level]["small operations"] > 0


def test_the_time_of_kernels_counts_once_and_to_their_level() -> None:
    """The profiler lists a kernel by itself as well as with the operation that started it."""

    def event(name: str, device: DeviceType, cpu: float, own: float, parent: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, device_type=device, self_cpu_time_total=cpu, self_device_time_total=own, cpu_parent=parent
        )

    mark = event("polyspec level 0 target", DeviceType.CPU, 100_000, 0)
    product = event("aten::mm", DeviceType.CPU, 50_000, 600_000, mark)
    sampling = event("aten::argmax", DeviceType.CPU, 10_000, 100_000)
    kernels = [event("ampere_sgemm", DeviceType.CUDA, 0, 600_000), event("reduce_kernel", DeviceType.CUDA, 0, 100_000)]
    found = shares([mark, product, sampling, *kernels], wall=1.0, on_cuda=True)
    assert found["0 target"]["matrix products"] == pytest.approx(0.6)
    assert found["0 target"]["Python"] == pytest.approx(0.1)
    assert found["between the levels"]["small operations"] == pytest.approx(0.1)
    assert found["between the levels"]["Python"] == pytest.approx(0.2)
    assert found["between the levels"]["matrix products"] == 0


def test_the_command_on_record_asks_for_the_same(tmp_path: Path) -> None:
    words = {field.name: None for field in fields(Asked)} | {
        "questions": "q.jsonl",
        "assistants": ["small=x"],
        "methods": [],
        "sweeps": [],
        "seed": 0,
        "temperatures": "0",
        "batch_sizes": "1",
        "pack": True,
        "warm_up": 3,
    }
    asked = Asked(**{**words, "device": "cuda:0", "breakdown": False})
    assert spelled(asked, Path("runs"), "cuda") == (
        "polyspec bench --questions q.jsonl --device cuda --assistant small=x --no-breakdown --output runs"
    )
    asked = Asked(**{**words, "device": "cuda:1", "breakdown": True})
    assert "--device cuda:1 " in spelled(asked, Path("runs"), "cuda:1")
    assert "breakdown" not in spelled(asked, Path("runs"), "cpu")


def test_settings_are_on_disk(bench_run: Path) -> None:
    settings = json.loads((bench_run / "settings.json").read_text())
    assert settings["--max-new-tokens"] == 8
    assert "--questions (SHA-256)" in settings
