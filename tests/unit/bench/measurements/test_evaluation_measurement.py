# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure evaluation`: a harness's own answers beside those of a chain, in turns."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import save_pair

from hf_polyspec.bench.measurements import evaluation
from hf_polyspec.bench.measurements.evaluation import PLAIN, Rate, main, measure, questions_of, ways_of
from hf_polyspec.bench.measurements.evaluation_harnesses import UNTIL, Answers, LmEval
from hf_polyspec.models.by_name import load_model, load_tokenizer

# lm-eval's registries and datasets' caches speak of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")
NEW = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target, small = save_pair(tmp_path_factory.mktemp("models"))
    return str(target), str(small)


class Scripted:
    """A harness whose models answer from a list, by a clock that the test turns."""

    def __init__(self, clock: Any, seconds: dict[str | None, float], answers: dict[str | None, Answers]) -> None:
        self.clock, self.seconds, self.answers = clock, seconds, answers

    def model(self, model: Any, tokenizer: Any, chain: str | None, batch: int) -> Any:
        return chain

    def evaluate(self, model: Any) -> Answers:
        self.clock.now += self.seconds[model] * (10 if self.clock.now < 50 else 1)  # the first ones take longer
        return self.answers[model]


def test_the_same_task_with_and_without_a_chain(folders: tuple[str, str], tmp_path: Path) -> None:
    target, small = folders
    harness = LmEval(questions_of(3), NEW, tmp_path)
    model, tokenizer = load_model(target), load_tokenizer(target)
    before = dict(vars(model))
    rates = measure(model, tokenizer, [f"{small},suffix"], harness, rounds=1, batch=2)
    assert dict(vars(model)) == before
    assert [(rate.form, rate.chain) for rate in rates] == ways_of([f"{small},suffix"])
    for rate in rates:
        assert (rate.samples, rate.alike, rate.batch) == (3, 3, 2)
        if rate.chain == PLAIN:
            assert (rate.tokens, rate.passes) == (0, 0)
        else:
            assert 0 < rate.passes < 0.6 * rate.tokens <= 0.6 * 3 * NEW
    texts = harness.evaluate(harness.model(model, tokenizer, None, 1)).texts
    assert len(set(texts)) == 3  # else equal answers would say little
    assert not any(UNTIL in text for text in texts)


def test_ratios_are_of_one_turn_and_differences_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(evaluation, "time", clock)
    monkeypatch.setattr(evaluation, "pack", lambda model: model)
    monkeypatch.setattr(evaluation, "sharing_copy", lambda model: model)
    right = Answers(("a", "b", "c"), 30, 10)
    wrong = replace(right, texts=("a", "b", "d"))
    scripted = Scripted(clock, {None: 2.0, "suffix": 1.0, "auto": 0.5}, {None: right, "suffix": right, "auto": wrong})
    rates = {(rate.form, rate.chain): rate for rate in measure(None, None, ["suffix", "auto"], scripted, rounds=2)}
    assert set(rates) == {
        ("as loaded", PLAIN), ("packed", PLAIN), ("as loaded", "suffix"), ("packed", "suffix"), ("as loaded", "auto"),
    }  # fmt: skip
    suffix, auto = rates["packed", "suffix"], rates["as loaded", "auto"]
    assert (suffix.alike, auto.alike) == (3, 2)
    assert (suffix.seconds, suffix.ratio, suffix.packed_ratio) == (1.0, 0.5, 0.5)
    assert (auto.seconds, auto.ratio) == (0.5, 0.25)
    assert rates["as loaded", PLAIN].first == 20.0
    assert rates["as loaded", "suffix"].first_ratio == 0.5


def test_the_command_writes_what_it_measured(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[Any] = []

    def measured(target: Any, tokenizer: Any, chains: Any, harness: Any, **how: Any) -> list[Rate]:
        asked.append((chains, type(harness), how))
        return [Rate("packed", "suffix", how["batch"], 2, 1, 40, 10, 1.5, 3.0, 0.25, 0.75, 0.5)]

    monkeypatch.setattr(evaluation, "measure", measured)
    main(["--model", folders[0], "--form", "float32", "--chain", "suffix", "--new-tokens", "4", "--questions", "2",
          "--rounds", "1", "--batch-size", "1", "3", "--json", str(tmp_path / "figures.json")])  # fmt: skip
    assert asked == [(["suffix"], LmEval, {"rounds": 1, "batch": batch}) for batch in (1, 3)]
    said = capsys.readouterr().out
    assert "lm-eval, 2 samples" in said
    assert re.search(r"packed +suffix +3 +1 of 2 +0\.25 +1\.50 +0\.25 +0\.75 +3\.00 +0\.50", said)
    assert [rate["batch"] for rate in json.loads((tmp_path / "figures.json").read_text())["rates"]] == [1, 3]


def test_what_cannot_be_measured_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--form", "bfloat16+pack"])
    assert "a dtype alone; the model is taken as it is and packed" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'needs lighteval: pip install "hf_polyspec\[lighteval\]"\.'):
        main(["--harness", "lighteval"])
