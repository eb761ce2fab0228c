# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of a head, on models so small that only the bookkeeping is tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_support import invented, write_questions
from tiny_checkpoints import save_pair
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import AutoModelForCausalLM

from hf_polyspec import generate
from hf_polyspec.bench.measurements import draft_vocabulary, head_acceptance, head_cost
from hf_polyspec.cli import app
from hf_polyspec.eagle import EagleHead


def pair() -> tuple[Any, EagleHead]:
    target = tiny(num_hidden_layers=4)
    return target, head_for(target)


def test_costs_are_shares_of_a_target_step() -> None:
    target, head = pair()
    costs = head_cost.measure(target, head, rows=8, context=12, repeats=3)
    assert [cost.name for cost in costs] == ["target step", "chain step", "tree level of 4", "tree level of 10"]
    assert costs[0].share == 1
    for cost in costs:
        assert cost.share == pytest.approx(cost.milliseconds / costs[0].milliseconds)
        assert cost.milliseconds > 0


def test_sizes_are_measured_over_the_same_texts() -> None:
    target, head = pair()
    inputs = [prompts(1, seed=seed) for seed in (3, 4)]
    results = draft_vocabulary.measure(target, head, inputs, (6, 12, VOCABULARY, None), new_tokens=8)
    assert [result.rows for result in results] == [6, 12, None], "a size that cuts nothing is left out"
    assert results[-1].scored == VOCABULARY
    assert results[-1].relative_speed == 1
    for result in results:
        assert 1 <= result.accepted_per_pass <= 6
        assert result.head_milliseconds > 0


def test_what_the_commands_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    target, head = pair()
    monkeypatch.setattr(head_cost, "load", lambda model, name: (target, head, None))
    monkeypatch.setattr(draft_vocabulary, "load", lambda model, name: (target, head, None))
    monkeypatch.setattr(draft_vocabulary, "PROMPTS", ("one",))
    monkeypatch.setattr(draft_vocabulary, "encode_prompt", lambda tokenizer, text, device: prompts(1))
    head_cost.main(["--repeats", "2", "--context", "8", "--json", str(tmp_path / "cost.json")])
    draft_vocabulary.main(["--head", "x", "--sizes", "6", "--new-tokens", "6", "--json", str(tmp_path / "rows.json")])
    cost, rows = (json.loads((tmp_path / name).read_text()) for name in ("cost.json", "rows.json"))
    assert cost["costs"][0]["name"] == "target step"
    assert [one["rows"] for one in rows["results"]] == [6, None]
    assert "torch" in cost["environment"]
    shown = capsys.readouterr().out
    assert "of a target step" in shown
    assert "tokens per pass" in shown


def test_the_first_prompts_of_each_task(tmp_path: Path) -> None:
    # Questions 1, 7, 13 are MT-bench's, 2, 8, 14 translations, and so on.
    found = head_acceptance.first_prompts(str(write_questions(tmp_path / "questions.jsonl", 3)), 2)
    assert list(found) == ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"]
    assert found["mt_bench"] == [invented(number, 2)[0] for number in (0, 6)]
    assert found["rag"] == [invented(number, 1)[0] for number in (5, 11)]


def test_acceptance_lengths_are_tokens_over_passes_of_all_prompts() -> None:
    target = tiny(num_hidden_layers=4)
    # A head that has learnt nothing is right so seldom that nothing would be seen; a noisy copy is right now and then.
    drafter = noisy(target, 0.05, seed=2)
    texts = {"qa": [prompts(1, seed=seed)["input_ids"] for seed in (3, 4)], "rag": [prompts(1, 6)["input_ids"]]}
    settings = head_acceptance.chosen_settings(["greedy", "chain"])
    assert [setting.name for setting in settings] == [
        "chain of 5, greedy", "tree of 16, greedy", "chain of 5, temperature 1", "chain of 5, greedy, head alone",
        "tree of 16, greedy, head alone",
    ]  # fmt: skip
    lengths = head_acceptance.average(target, [drafter], texts, settings, new_tokens=17)
    counts = {}
    for task, ids in texts.items():
        counts[task] = [0, 0]
        for one in ids:
            stats = generate(
                target,
                input_ids=one,
                attention_mask=torch.ones_like(one),
                assistant_models=[drafter],
                max_new_tokens=17,
                do_sample=False,
                num_assistant_tokens=5,
                num_assistant_tokens_schedule="constant",
                assistant_confidence_threshold=0.0,
                return_dict_in_generate=True,
            ).polyspec
            counts[task][0] += 17
            counts[task][1] += stats.levels[0].forward_passes
    name = "chain of 5, greedy"
    for task, (tokens, passes) in counts.items():
        assert lengths[name, task] == pytest.approx(tokens / passes)
    # Over all prompts at once: not the mean of the tasks' means.
    tokens, passes = (sum(column) for column in zip(*counts.values(), strict=True))
    assert lengths[name, "all"] == pytest.approx(tokens / passes)
    assert 1 < lengths[name, "all"] < 6
    assert lengths["chain of 5, temperature 1", "all"] > 1


def test_sampled_prompts_are_answered_as_often_as_asked() -> None:
    target = tiny(num_hidden_layers=4)
    drafter, ids = noisy(target, 0.05, seed=2), prompts(1, seed=3)["input_ids"]
    (setting,) = head_acceptance.chosen_settings(["chain of 5, temperature 1"])
    found = [head_acceptance.measure(target, [drafter], ids, setting, 17, seed) for seed in (0, 1, 2)]
    assert len({passes for _, passes in found}) > 1
    lengths = head_acceptance.average(target, [drafter], {"qa": [ids]}, [setting], new_tokens=17, seeds=3)
    assert lengths[setting.name, "qa"] == pytest.approx(sum(t for t, _ in found) / sum(p for _, p in found))


def test_what_the_acceptance_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pair(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    head_for(target).save_pretrained(tmp_path / "head")
    questions = write_questions(tmp_path / "questions.jsonl", 2)
    kept = tmp_path / "lengths.json"
    given = ["--model", str(tmp_path / "target"), "--assistant", str(tmp_path / "head"), "--questions", str(questions)]
    head_acceptance.main([*given, "--limit", "1", "--new-tokens", "6", "--setting", "greedy", "--json", str(kept)])
    rows = json.loads(kept.read_text())["rows"]
    assert [row["task"] for row in rows if row["setting"] == "tree of 16, greedy"].count("all") == 1
    assert len(rows) == 4 * 7  # chain and tree, with and without what is copied; six tasks and all
    assert all(1 <= row["length"] <= 6 for row in rows)
    assert "tokens a pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--setting", "beams", "--setting 'beams' is a part of none of the settings 'chain of 5, greedy'"),
        ("--limit", "0", "argument --limit: must be a whole number of at least 1, got '0'."),
        ("--new-tokens", "few", "argument --new-tokens: must be a whole number of at least 1, got 'few'."),
        ("--questions", "nowhere.jsonl", "There is no question file nowhere.jsonl"),
    ],
)
def test_what_the_acceptance_command_refuses(
    option: str, value: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "questions.jsonl")
    with pytest.raises(SystemExit) as ended:
        app(["measure", "head-acceptance", "--assistant", "suffix", "--questions", str(questions), option, value])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("head-cost", ["--repeats", "0"], "argument --repeats: must be a whole number of at least 1, got '0'."),
        ("head-cost", ["--rows", "some"], "argument --rows: must be a whole number of at least 1, got 'some'."),
        (
            "draft-vocabulary",
            ["--head", "x", "--prompts", "none.txt"],
            "--prompts: there is no file none.txt.",
        ),
        (
            "draft-vocabulary",
            ["--head", "x", "--prompts", "blank.txt"],
            "--prompts: blank.txt holds no lines.",
        ),
        (
            "draft-vocabulary",
            ["--head", "x", "--tree-tokens", "-1"],
            "a whole number, 0 for none, got '-1'.",
        ),
        ("head-cost", ["--model", "./nowhere"], "There is no folder ./nowhere."),
    ],
)
def test_mistakes_are_one_sentence(
    name: str, words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("\n  \n")
    with pytest.raises(SystemExit) as ended:
        app(["measure", name, *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_heads_are_measured_in_the_type_they_run_in(tmp_path: Path) -> None:
    save_pair(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    head_for(target).half().save_pretrained(tmp_path / "head")
    _, head, _ = head_cost.load(str(tmp_path / "target"), str(tmp_path / "head"))
    assert head.dtype == torch.float32
    assert head.is_bound
    with pytest.raises(ValueError, match=r"--head .*small is no EAGLE head but a LlamaForCausalLM\."):
        head_cost.load(str(tmp_path / "target"), str(tmp_path / "small"))
