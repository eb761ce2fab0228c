# SPDX-License-Identifier: Apache-2.0
"""A killed run continues exactly; batches split over turns or processes give the same step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.config import OptimizationSettings, build_config
from hf_polyspec.eagle.training.dataset import Corpus, load_corpus, spread
from hf_polyspec.eagle.training.loop import Progress, Trainer
from hf_polyspec.eagle.training.losses import LossSums, eagle3_loss
from hf_polyspec.eagle.training.shards import GREEDY, SAMPLED

OPTIMIZATION: dict[str, Any] = {
    "epochs": 3,
    "steps": 2,
    "batch_tokens": 64,
    "learning_rate": 3e-3,
    "warmup_steps": 3,
    "validation_fraction": 0.2,
    "validation_steps": 2,
    "validate_every": 10,
    "checkpoint_every": 4,
    "log_every": 1,
}


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


class Setting:
    """Makes trainers over the same texts."""

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Path, folder: Path) -> None:
        self.target, self.tokenizer, self.texts, self.folder = target, tokenizer, texts, folder

    def corpus(self) -> Corpus:
        return load_corpus([self.texts], 64, 0.2, seed=0)

    def trainer(self, name: str, algorithm: str = "eagle3", corpus: Corpus | None = None, **changes: Any) -> Trainer:
        whole = "softmax_ids" in changes
        head = {"algorithm": algorithm, "draft_vocab_size": None if whole else 30}
        given = {key: changes.pop(key, None) for key in ("init_from", "texts", "validate_on")}
        config = build_config(
            {
                "target": "tiny",
                "output": str(self.folder / name),
                **given,
                "head": head,
                "optimization": {**OPTIMIZATION, **changes},
            }
        )
        config.folder.mkdir(exist_ok=True)
        # the precision is fixed once a process; these runs want different ones
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision=config.optimization.mixed_precision)
        return Trainer(config, self.target, self.target, self.tokenizer, corpus or self.corpus(), accelerator)

    def curve(self, name: str) -> list[str]:
        """All columns but the pace."""
        lines = (self.folder / name / "curve.csv").read_text().splitlines()
        return [line.rsplit(",", 1)[0] for line in lines]


@pytest.fixture
def setting(
    chat_target: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerFast, texts_folder: Path, tmp_path: Path
) -> Iterator[Setting]:
    yield Setting(chat_target, chat_tokenizer, texts_folder, tmp_path)
    AcceleratorState._reset_state(True)


def kill_at(*steps: int) -> Any:
    def report(progress: Progress) -> None:
        if progress.step in steps:
            raise Killed

    return report


def weights(head: EagleHead) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in head.state_dict().items()}


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        ("eagle3", {"optimizer": "adamw"}),
        ("eagle3", {"optimizer": "muon"}),
        ("eagle1", {"optimizer": "adamw"}),
        ("eagle3", {"softmax_ids": 16, "objective": "negative_log_acceptance", "greedy_temperature": 0.5}),
        ("eagle1", {"softmax_ids": 16}),
    ],
)
def test_a_killed_run_continues_exactly(setting: Setting, algorithm: str, changes: dict[str, Any]) -> None:
    whole = setting.trainer("whole", algorithm, **changes)
    assert len(whole.optimizers) == (2 if changes.get("optimizer") == "muon" else 1)
    acceptance = whole.run()
    total = sum(whole.steps_per_epoch)
    assert total > 18
    # once between two checkpoints, once in another epoch, once before any new checkpoint
    for step in (6, total // 2 + 3, total // 2 + 4):
        with pytest.raises(Killed):
            setting.trainer("broken", algorithm, **changes).run(report=kill_at(step))
    last = setting.trainer("broken", algorithm, **changes)
    assert last.run() == acceptance
    assert setting.curve("broken") == setting.curve("whole")
    assert len(setting.curve("whole")) == total + 1
    records = [(setting.folder / name / "validation.jsonl").read_text() for name in ("whole", "broken")]
    assert records[0] == records[1]
    assert weights(last.head).keys() == weights(whole.head).keys()
    for name, weight in weights(whole.head).items():
        assert torch.equal(weights(last.head)[name], weight), name


def test_every_text_is_used_once_an_epoch_across_a_kill(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[list[int]] = []
    whole = Trainer._step

    def noted(self: Trainer, group: list[list[int]]) -> Any:
        used.append(sorted(i for batch in group for i in batch))
        return whole(self, group)

    monkeypatch.setattr(Trainer, "_step", noted)
    trainer = setting.trainer("run", epochs=1, checkpoint_every=1)
    total = sum(trainer.steps_per_epoch)
    with pytest.raises(Killed):
        trainer.run(report=kill_at(3))
    # the step that was not checkpointed is undone and done again, nothing else is
    before = used[:2]
    used.clear()
    setting.trainer("run", epochs=1, checkpoint_every=1).run()
    assert sorted(i for group in before + used for i in group) == list(range(len(setting.corpus().train)))
    assert len(before) + len(used) == total


def test_a_deadline_stops_resumably(setting: Setting) -> None:
    first = setting.trainer("run", epochs=1)
    assert first.run(deadline=0.0) is None
    assert first.state.step == 1
    assert not first.finished
    second = setting.trainer("run", epochs=1)
    assert second.run() is not None
    assert second.finished
    setting.trainer("whole", epochs=1).run()
    assert setting.curve("run") == setting.curve("whole")


def test_other_texts_are_refused_on_resume(setting: Setting) -> None:
    setting.trainer("run", epochs=1).run(deadline=0.0)
    corpus = setting.corpus()
    fewer = Corpus(corpus.train[:-1], corpus.validation)
    with pytest.raises(ValueError, match="texts changed since this run began"):
        setting.trainer("run", corpus=fewer, epochs=1).run()


def test_accumulated_batches_give_the_step_of_one_large_batch(setting: Setting) -> None:
    """Rows are weighted alike, whichever batch they are in; with a mean of means this fails."""
    corpus = setting.corpus()
    steps = []
    for name, batches in (("one", [[0, 1, 2, 3, 4, 5]]), ("three", [[0], [1, 2, 3], [4, 5]])):
        trainer = setting.trainer(name, corpus=corpus, clip=1e9)
        sums, norm = trainer._step(batches)
        steps.append((float(sums.loss), int(sums.rows), norm, weights(trainer.head)))
    assert steps[0][1] == steps[1][1] == sum(len(t) - t.prompt_length for t in corpus.train[:6])
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-5)
    assert steps[0][2] == pytest.approx(steps[1][2], rel=1e-4)


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle1"])
def test_mixed_precision_stays_near_single_precision(setting: Setting, algorithm: str) -> None:
    losses = []
    for precision in ("no", "bf16"):
        trainer = setting.trainer(precision, algorithm, mixed_precision=precision, feature_noise=0.0)
        sums, _ = trainer._step([[0, 1, 2, 3]])
        losses.append(float(sums.loss))
        assert trainer.head.dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_learning_lowers_the_loss(setting: Setting) -> None:
    trainer = setting.trainer("run", epochs=12, validate_every=10**6)
    trainer.run()
    lines = setting.curve("run")[1:]
    losses = [float(line.split(",")[3]) for line in lines]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_a_head_can_be_trained_further(setting: Setting) -> None:
    first = setting.trainer("first", epochs=1)
    first.run()
    first.head.save_pretrained(str(setting.folder / "saved"))
    second = setting.trainer("second", init_from=str(setting.folder / "saved"), epochs=1)
    for name, weight in weights(first.head).items():
        assert torch.equal(weights(second.head)[name], weight), name


def test_a_loss_is_computed_over_the_ids_asked_for(setting: Setting) -> None:
    losses = {}
    for ids in (None, 8):
        setting.trainer(f"ids-{ids}", softmax_ids=ids, epochs=1).run()
        losses[ids] = [float(line.split(",")[3]) for line in setting.curve(f"ids-{ids}")[1:]]
    # an unlearned head is about as unsure as there are ids to choose from
    assert losses[8][0] < losses[None][0] - 0.05


def test_one_row_in_so_many_drafts_on(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[torch.Tensor | None, int]] = []

    def noted(*parts: Any, **rest: Any) -> LossSums:
        kept.append(parts[-2:])
        return eagle3_loss(*parts, **rest)

    monkeypatch.setattr("hf_polyspec.eagle.training.lesson.eagle3_loss", noted)
    setting.trainer("stride", row_stride=3, epochs=2).run()
    begins = [int(rows[0]) - first for rows, first in kept if rows is not None]
    assert len(begins) == len(kept) > 10
    assert set(begins) == {0, 1, 2}
    assert all((rows.diff() == 3).all() for rows, _ in kept if rows is not None)
    kept.clear()
    setting.trainer("all", epochs=1).run()
    assert [rows for rows, _ in kept] == [None] * len(kept) != []


def test_rows_of_prompts_are_left_out_without_a_difference(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    firsts: list[int] = []

    def noted(*parts: Any, **rest: Any) -> LossSums:
        firsts.append(parts[-1])
        return eagle3_loss(*parts, **rest)

    monkeypatch.setattr("hf_polyspec.eagle.training.lesson.eagle3_loss", noted)
    short = setting.trainer("short", epochs=1, steps=1)
    short.run()
    assert max(firsts) > 0
    firsts.clear()
    setting.trainer("prompts", epochs=1, steps=1, learn_prompts=True).run()
    assert max(firsts) == 0
    firsts.clear()
    monkeypatch.setattr(Trainer, "_first", lambda self, batch: 0)
    whole = setting.trainer("whole", epochs=1, steps=1)
    whole.run()
    assert max(firsts) == 0
    for one, other in zip(short.head.parameters(), whole.head.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_greedy_texts_have_a_temperature_of_their_own(setting: Setting) -> None:
    trainer = setting.trainer("run", greedy_temperature=0.5)
    texts = trainer.corpus.train[:8]
    kinds = [text.kind for text in texts]
    assert set(kinds) == {GREEDY, SAMPLED}
    _, view = trainer._load(texts, 0)
    assert view.temperatures is not None
    assert view.temperatures.tolist() == [0.5 if kind == GREEDY else 1.0 for kind in kinds]
    assert setting.trainer("plain")._load(texts, 0)[1].temperatures is None


def test_a_curve_is_named_after_its_objective(setting: Setting) -> None:
    setting.trainer("run", epochs=1, objective="negative_log_acceptance").run()
    columns = setting.curve("run")[0].split(",")
    assert "negative_log_acceptance_0" in columns
    assert not [column for column in columns if column.startswith("cross_entropy")]


def test_a_head_of_few_ids_can_learn_all_of_them(setting: Setting) -> None:
    first = setting.trainer("first", epochs=1)
    assert first.head.config.maps_vocabulary
    first.head.save_pretrained(str(setting.folder / "saved"))
    second = setting.trainer("second", init_from=str(setting.folder / "saved"), softmax_ids=16, epochs=12)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    known = first.head.target_ids()
    torch.testing.assert_close(second.head.logits(hidden)[:, known], first.head.logits(hidden))
    assert second.head.logits(hidden).shape == (3, 45)
    second.run()
    # compared on all ids, though it has only ever been told about some at a time
    third = setting.trainer("third", init_from=str(setting.folder / "saved"), softmax_ids=44)
    entropies = []
    for trainer in (second, third):
        batch, view = trainer._load(setting.corpus().validation, 0)
        losses = trainer.module(batch.tokens, batch.answer, view)
        entropies.append(float(losses.per_step.sum() / losses.counted.sum()))
    assert entropies[0] < 0.98 * entropies[1]


def test_old_checkpoints_go(setting: Setting) -> None:
    trainer = setting.trainer("run", epochs=1, checkpoint_every=1, keep_checkpoints=2)
    trainer.run()
    names = sorted(path.name for path in (setting.folder / "run" / "checkpoints").iterdir())
    total = sum(trainer.steps_per_epoch)
    assert names == [f"step-{total - 1:08d}", f"step-{total:08d}"]


def test_half_a_checkpoint_is_ignored(setting: Setting) -> None:
    with pytest.raises(Killed):
        setting.trainer("run", epochs=1).run(report=kill_at(6))
    (setting.folder / "run" / "checkpoints" / "partial-00000008").mkdir()
    trainer = setting.trainer("run", epochs=1)
    assert trainer.state_of_play() == "going on from step-00000004"
    trainer.run()
    assert not list((setting.folder / "run" / "checkpoints").glob("partial-*"))


def test_one_validation_a_step_though_the_last_step_has_two_reasons(setting: Setting) -> None:
    trainer = setting.trainer("run", epochs=1, validate_every=1)
    trainer.run()
    path = setting.folder / "run" / "validation.jsonl"
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(1, sum(trainer.steps_per_epoch) + 1))


def test_a_curve_that_was_only_opened_before_a_kill(setting: Setting) -> None:
    with pytest.raises(Killed):
        setting.trainer("run", epochs=1).run(report=kill_at(6))
    (setting.folder / "run" / "curve.csv").write_text("")
    setting.trainer("run", epochs=1).run()
    assert setting.curve("run")[0].startswith("step,")


def test_records_are_plain_json(setting: Setting) -> None:
    setting.trainer("run", epochs=1).run()
    for line in (setting.folder / "run" / "validation.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert {"step", "epoch", "tokens"} < record.keys()
        for kind in ("greedy", "sampled", "learned_greedy", "learned_sampled"):
            assert len(record[kind]["chain"]) == 2
            assert 1.0 <= record[kind]["mean_acceptance_length"] <= 3.0


def test_validation_looks_at_answers_and_spoils_no_features(setting: Setting) -> None:
    trainer = setting.trainer("run", learn_prompts=True, validation_texts=3)
    found = trainer.validate()
    for kinds, texts in (
        (("greedy", "sampled"), spread(trainer.corpus.validation, 3)),
        (("learned_greedy", "learned_sampled"), spread(trainer.corpus.train, 3)),
    ):
        rows = sum(len(text) - text.prompt_length - 1 for text in texts)
        assert len(texts) <= 3
        assert sum(int(str(found[kind]["rows"])) for kind in kinds if kind in found) == rows
    # what it made the cache remember of learned texts serves their prompts as well
    plain = setting.trainer("plain", learn_prompts=True)
    _, view = trainer._load([trainer.corpus.train[0]], 0)
    assert trainer.source.remembered > 0  # type: ignore[union-attr]
    assert torch.equal(view.best, plain._load([plain.corpus.train[0]], 0)[1].best)


def test_validation_on_some_of_the_folders(setting: Setting, tmp_path: Path) -> None:
    """A head to go on with may have learned what this run holds out of its old texts."""
    again = tmp_path / "again"
    shutil.copytree(setting.texts, again)
    folders = [str(setting.texts), str(again)]
    corpus = load_corpus([setting.texts, again], 64, 0.2, seed=0)
    new = [text for text in corpus.validation if text.number >> 40 == 1]
    assert new
    assert len(new) < len(corpus.validation)
    trainer = setting.trainer("run", corpus=corpus, texts=folders, validate_on=[str(again)])
    assert trainer.held_out == new
    assert setting.trainer("all", corpus=corpus, texts=folders).held_out == corpus.validation
    none_held = Corpus(corpus.train, [text for text in corpus.validation if text not in new])
    with pytest.raises(ValueError, match="no text of the folders in validate_on is held out"):
        setting.trainer("none", corpus=none_held, texts=folders, validate_on=str(again))


@pytest.mark.parametrize(("schedule", "expected"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_learning_rate(schedule: str, expected: float) -> None:
    plan = OptimizationSettings(learning_rate=1.0, warmup_steps=10, schedule=schedule)
    assert plan.rate(0, 110) == pytest.approx(0.1)
    assert plan.rate(9, 110) == pytest.approx(1.0)
    assert plan.rate(60, 110) == pytest.approx(expected)
    assert plan.rate(110, 110) == pytest.approx(1.0 if schedule == "constant" else 0.0)
