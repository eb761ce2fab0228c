# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure evaluation`: a harness's own answers beside those of a chain, in turns."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_pair

from hf_polyspec.bench.measurements import evaluation
from hf_polyspec.bench.measurements.evaluation import PLAIN, Rate, main, measure, questions_of, ways_of
from hf_polyspec.bench.measurements.evaluation_harnesses import UNTIL, Answers, LmEval
from hf_polyspec.bench.measurements.evaluation_ties import Judge, Parting
from hf_polyspec.bench.ties import tie_tolerance
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
    rates, partings = measure(model, tokenizer, [f"{small},suffix"], harness, rounds=1, batches=[2])
    assert dict(vars(model)) == before
    assert [(rate.form, rate.chain) for rate in rates] == ways_of([f"{small},suffix"])
    assert partings == []
    for rate in rates:
        assert (rate.samples, rate.alike, rate.ties, rate.batch) == (3, 3, 0, 2)
        if rate.chain == PLAIN:
            assert (rate.tokens, rate.passes) == (0, 0)
        else:
            assert 0 < rate.passes < 0.6 * rate.tokens <= 0.6 * 3 * NEW
    found = harness.evaluate(harness.model(model, tokenizer, None, 2))
    assert len(set(found.texts)) == 3  # else equal answers would say little
    assert not any(UNTIL in text for text in found.texts)
    for question, text, (prompt, new) in zip(questions_of(3), found.texts, found.ids, strict=True):
        assert tokenizer.decode(prompt, skip_special_tokens=True).endswith(question)
        assert text == tokenizer.decode(new, skip_special_tokens=True).split(UNTIL)[0]
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :]
        assert alone.tolist() == new[: len(alone)]  # the padding of a batch is not among what was given


def test_answers_that_differ_are_looked_at_in_float32(folders: tuple[str, str]) -> None:
    """One at the second choice, one at the worst; the third wrote another id behind the end of the same text."""
    target, tokenizer = load_model(folders[0], "bfloat16"), load_tokenizer(folders[0])
    prompt = [5, 6, 7, 8]
    with torch.no_grad():
        logits = copy.deepcopy(target).float()(torch.tensor([prompt])).logits[0, -1]
    best, second, *_, worst = logits.argsort(descending=True).tolist()
    gap = float(logits[best] - logits[second])
    wanted = Answers(("a", "a", "a"), 0, 0, ((prompt, [best, 3]),) * 3)
    own = Answers(("a", "b", "c"), 9, 3, ((prompt, [best, 4]), (prompt, [second, 3]), (prompt, [worst, 3])))
    judge = Judge(target, tokenizer)
    found = judge.partings(("packed", "suffix"), 4, own, wanted)
    assert target.dtype == torch.bfloat16  # what was loaded stays so
    assert [(one.sample, one.step, one.ids) for one in found] == [
        (1, 0, (best, second)), (2, 0, (best, worst)),
    ]  # fmt: skip
    assert found[0].gap == pytest.approx(gap, abs=1e-5)
    size = max(map(abs, logits[[best, second]].tolist()))
    tolerance = tie_tolerance(torch.bfloat16, size)
    assert found[0].tolerance == pytest.approx(tolerance)
    above = torch.tensor(size, dtype=torch.bfloat16).nextafter(torch.tensor(1e9, dtype=torch.bfloat16)).float()
    step = float(above - torch.tensor(size, dtype=torch.bfloat16).float())
    assert found[0].places == pytest.approx(gap / step, rel=1e-2)
    assert [one.tie for one in found] == [gap <= tolerance, float(logits[best] - logits[worst]) <= tolerance]
    assert "packed, suffix, 4 at a time, sample 2, id 0: " in str(found[1])
    assert judge.partings(("packed", "suffix"), 4, replace(own, ids=()), wanted) == []


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
    parting = Parting("as loaded", "auto", 1, 2, 5, (7, 8), 0.25, 2.0, 0.5, True)
    monkeypatch.setattr(Judge, "partings", lambda _, way, batch, own, wanted: [parting] if own != wanted else [])
    scripted = Scripted(clock, {None: 2.0, "suffix": 1.0, "auto": 0.5}, {None: right, "suffix": right, "auto": wrong})
    found, partings = measure(None, None, ["suffix", "auto"], scripted, rounds=2)
    assert partings == [parting]
    rates = {(rate.form, rate.chain): rate for rate in found}
    assert set(rates) == {
        ("as loaded", PLAIN), ("packed", PLAIN), ("as loaded", "suffix"), ("packed", "suffix"), ("as loaded", "auto"),
    }  # fmt: skip
    suffix, auto = rates["packed", "suffix"], rates["as loaded", "auto"]
    assert (suffix.alike, suffix.ties, auto.alike, auto.ties) == (3, 0, 2, 1)
    assert (suffix.seconds, suffix.ratio, suffix.packed_ratio) == (1.0, 0.5, 0.5)
    assert (auto.seconds, auto.ratio) == (0.5, 0.25)
    assert rates["as loaded", PLAIN].first == 20.0
    assert rates["as loaded", "suffix"].first_ratio == 0.5


def test_a_chain_is_compared_at_its_batch_and_the_model_alone_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "pack", lambda model: model)
    monkeypatch.setattr(evaluation, "sharing_copy", lambda model: model)
    told = {1: Answers(("a", "b"), 0, 0), 4: Answers(("a", "c"), 0, 0)}

    class Batched:
        def model(self, model: Any, tokenizer: Any, chain: str | None, batch: int) -> Any:
            return batch

        def evaluate(self, model: Any) -> Answers:
            return told[model]

    rates, _ = measure(None, None, ["suffix"], Batched(), rounds=1, batches=[1, 4])
    assert {(rate.batch, rate.chain, rate.alike) for rate in rates} == {
        (1, PLAIN, 2), (1, "suffix", 2), (4, PLAIN, 1), (4, "suffix", 2),
    }  # fmt: skip


def test_the_command_writes_what_it_measured(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[Any] = []

    def measured(target: Any, tokenizer: Any, chains: Any, harness: Any, **how: Any) -> Any:
        asked.append((chains, type(harness), how))
        rates = [
            Rate("packed", "suffix", batch, 2, 1, 1, 40, 10, 1.5, 3.0, 0.25, 0.75, 0.5) for batch in how["batches"]
        ]
        return rates, [Parting("packed", "suffix", 3, 1, 5, (7, 8), 0.25, 2.0, 0.5, True)]

    monkeypatch.setattr(evaluation, "measure", measured)
    main(["--model", folders[0], "--form", "float32", "--chain", "suffix", "--new-tokens", "4", "--questions", "2",
          "--rounds", "1", "--batch-size", "1", "3", "--json", str(tmp_path / "figures.json")])  # fmt: skip
    assert asked == [(["suffix"], LmEval, {"rounds": 1, "batches": [1, 3]})]
    said = capsys.readouterr().out
    assert "lm-eval, 2 samples" in said
    assert re.search(r"packed +suffix +3 +1 of 2 +1 +0\.25 +1\.50 +0\.25 +0\.75 +3\.00 +0\.50", said)
    line = "sample 1, id 5: a tie, 0.250 apart in float32, 2.0 units in the last place (a tie is 0.500)"
    assert f"packed, suffix, 3 at a time, {line}" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [rate["batch"] for rate in figures["rates"]] == [1, 3]
    assert figures["partings"][0]["ids"] == [7, 8]


def test_what_cannot_be_measured_is_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--form", "bfloat16+pack"])
    assert "a dtype alone; the model is taken as it is and packed" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r'needs lighteval: pip install "hf_polyspec\[lighteval\]"\.'):
        main(["--harness", "lighteval"])
