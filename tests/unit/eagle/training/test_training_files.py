# SPDX-License-Identifier: Apache-2.0
"""What a run leaves on disk outlives a kill: lines that were cut off, files that were damaged, folders half written."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel

from hf_polyspec.eagle import init_for
from hf_polyspec.eagle.features import target_parts
from hf_polyspec.eagle.training import card
from hf_polyspec.eagle.training.card import RunFacts, draw_curve, publish
from hf_polyspec.eagle.training.checkpoints import Checkpoints
from hf_polyspec.eagle.training.config import build_config, load_config
from hf_polyspec.eagle.training.curve import append_row, forget_after, put_validation, read_curve, read_validations
from hf_polyspec.eagle.training.dataset import TargetReader, collate, load_corpus
from hf_polyspec.eagle.training.feature_cache import FeatureCache
from hf_polyspec.eagle.training.kept_states import Seen, read_seen
from hf_polyspec.eagle.training.prompts import read_prompts
from hf_polyspec.eagle.training.shards import (
    GREEDY,
    Sample,
    ShardWriter,
    read_progress,
    read_provenance,
    read_samples,
)
from hf_polyspec.errors import DamagedFileError

ROWS = [{"step": step, "loss": 1.5 / step, "rate": 1e-4} for step in (1, 2, 3, 4)]
RECORDS: list[dict[str, Any]] = [{"step": step, "greedy": {"rows": 10 * step}} for step in (2, 4)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a curve of four rows and two validations."""
    for row in ROWS:
        append_row(tmp_path / "curve.csv", row)
    for record in RECORDS:
        put_validation(tmp_path / "validation.jsonl", record)
    return tmp_path


def add(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


# -- curves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ["1", "5,0.2", "5,0.25,0.00", "st", '"', "5,0.25,0.0001"])
def test_half_a_row_is_dropped_and_all_others_stay(run: Path, torn: str, caplog: pytest.LogCaptureFixture) -> None:
    curve = run / "curve.csv"
    whole = curve.read_bytes()
    add(curve, torn)
    assert [int(row["step"]) for row in read_curve(curve)] == [1, 2, 3, 4]
    forget_after(run, 4)
    assert curve.read_bytes() == whole
    assert str(curve) in caplog.text
    assert repr(torn) in caplog.text
    append_row(curve, {"step": 5, "loss": 0.3, "rate": 1e-4})
    assert curve.read_bytes() == whole + b"5,0.3,0.0001\n"


@pytest.mark.parametrize("torn", ['{"step": 4, "epo', "{", '{"step": 1, "greedy": {}}'])
def test_half_a_validation_is_dropped_and_all_others_stay(run: Path, torn: str) -> None:
    path = run / "validation.jsonl"
    whole = path.read_bytes()
    add(path, torn)
    forget_after(run, 4)
    assert path.read_bytes() == whole
    add(path, torn)
    put_validation(path, {"step": 6})
    assert [record["step"] for record in read_validations(path)] == [2, 4, 6]
    assert path.read_bytes().startswith(whole)


def test_what_came_after_a_checkpoint_is_forgotten(run: Path) -> None:
    forget_after(run, 3)
    assert [int(row["step"]) for row in read_curve(run / "curve.csv")] == [1, 2, 3]
    assert read_validations(run / "validation.jsonl") == RECORDS[:1]
    forget_after(run, 0)
    assert not (run / "curve.csv").exists()
    assert read_validations(run / "validation.jsonl") == []


def test_a_curve_of_half_a_header_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "curve.csv").write_text("step,lo")
    forget_after(tmp_path, 10)
    assert not (tmp_path / "curve.csv").exists()
    (tmp_path / "curve.csv").write_text("step,lo")
    append_row(tmp_path / "curve.csv", ROWS[0])
    assert (tmp_path / "curve.csv").read_text() == "step,loss,rate\n1,1.5,0.0001\n"


def test_curves_of_earlier_releases_go_on(run: Path) -> None:
    """Their lines ended as on Windows."""
    curve = run / "curve.csv"
    curve.write_bytes(curve.read_bytes().replace(b"\n", b"\r\n"))
    forget_after(run, 2)
    assert curve.read_text() == "step,loss,rate\n1,1.5,0.0001\n2,0.75,0.0001\n"


@pytest.mark.parametrize(
    ("name", "line"),
    [("curve.csv", "3,0.5"), ("curve.csv", "3,a,b"), ("validation.jsonl", "{}"), ("validation.jsonl", "nonsense")],
)
def test_nonsense_in_the_middle_is_named(run: Path, name: str, line: str) -> None:
    path = run / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:], ""]))
    with pytest.raises(DamagedFileError, match=rf"{name} is damaged \(line 2 .*same command again"):
        forget_after(run, 4)


def test_a_curve_without_rows_is_not_drawn(tmp_path: Path) -> None:
    assert draw_curve(tmp_path) is None
    (tmp_path / "curve.csv").write_text("step,cross_entropy_0\n")
    assert draw_curve(tmp_path) is None
    (tmp_path / "curve.csv").write_text("step,cross_entropy_0\n1,0.5\n2,0.")
    picture = draw_curve(tmp_path)
    assert picture is not None
    assert picture.stat().st_size > 1000


# -- shards and states ---------------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """One shard of a text, with states."""
    folder = tmp_path / "texts"
    seen = Seen(np.ones((4, 6), np.float16), np.zeros(4, np.int32))
    writer = ShardWriter(folder, 0, 100, {"prompts": "made up"}, "mine")
    writer.add(Sample(0, (1, 2, 3, 4, 5), 2, GREEDY, seen))
    writer.flush()
    return folder


@pytest.mark.parametrize("read", [read_samples, read_provenance, read_progress])
def test_a_shard_that_was_cut_off_is_named(texts: Path, read: Callable[[Path], Any]) -> None:
    [shard] = texts.glob("shard-*")
    cut(shard)
    with pytest.raises(DamagedFileError, match="written again by the same command") as error:
        list(read(texts) if read is not read_progress else [read(texts)])
    assert str(shard) in str(error.value)


def test_states_that_were_cut_off_are_named(texts: Path) -> None:
    assert [number for number, _ in read_seen(texts, "mine")] == [0]
    [states] = texts.glob("states-*")
    cut(states)
    with pytest.raises(DamagedFileError, match="computed again") as error:
        list(read_seen(texts, "mine"))
    assert str(states) in str(error.value)


def test_shards_and_states_follow_the_umask_and_leave_nothing_beside(tmp_path: Path, texts: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in texts.iterdir()}
    assert modes == {stat.S_IMODE(usual.stat().st_mode)}
    assert {path.name for path in texts.iterdir()} == {
        "shard-000-00000.safetensors", "states-000-00000.safetensors",
    }  # fmt: skip


# -- the feature cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["marker", "array cut off", "array gone"])
def test_a_damaged_cache_is_begun_anew(
    chat_target: PreTrainedModel, texts_folder: Path, tmp_path: Path, damage: str
) -> None:
    head = init_for(chat_target, "eagle3", list(range(30)))
    parts = target_parts(chat_target)
    reader = TargetReader(chat_target, head.config, parts)
    corpus = load_corpus([texts_folder], 64, 0.2, seed=0)

    def cache() -> FeatureCache:
        return FeatureCache(tmp_path, reader, corpus.train, head.config.feature_size, parts.hidden_size, "tiny")

    batch = collate(corpus.train[:3])
    before = cache().read(batch)
    if damage == "array gone":
        (tmp_path / "final").unlink()
    else:
        cut(tmp_path / ("cache.json" if damage == "marker" else "features"))
    again = cache()
    assert again.remembered == 0
    after = again.read(batch)
    assert torch.equal(after.features, before.features)
    assert torch.equal(after.final, before.final)


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def test_checkpoints_are_whole_follow_the_umask_and_are_named_when_damaged(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    module = accelerator.prepare(torch.nn.Linear(20, 20))
    checkpoints = Checkpoints(tmp_path / "checkpoints", accelerator, keep=2)
    before = os.umask(0o027)
    try:
        checkpoints.save(1)
        kept = module.weight.detach().clone()
        with torch.no_grad():
            module.weight.add_(1.0)
        newest = checkpoints.save(2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in newest.rglob("*") if path.is_file()} == {0o640}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}
    cut(newest / "model.safetensors")
    with pytest.raises(DamagedFileError, match=r"step-00000002 is damaged .*goes on from the checkpoint before it"):
        checkpoints.load_newest()
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert checkpoints.load_newest() == tmp_path / "checkpoints" / "step-00000001"
    assert torch.equal(module.weight, kept)


# -- the finished head ---------------------------------------------------------------------------------------


def test_a_kill_while_publishing_leaves_no_half_head(
    chat_target: PreTrainedModel, texts_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config({"target": "tiny", "output": str(tmp_path), "texts": str(texts_folder)})
    head = init_for(chat_target, "eagle3", list(range(30)), own_lm_head=False)
    corpus = load_corpus([texts_folder], 64, 0.2, seed=0)
    facts = RunFacts(1, 1, 1.0, "a CPU", 1)

    def killed(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(card, "card_text", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(head, config, corpus, {}, facts)
    assert list((tmp_path / "head").iterdir()) == []
    publish(head, config, corpus, {}, facts)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "head").iterdir()}
    assert {"config.json", "model.safetensors", "training.yaml", "README.md"} <= whole.keys()
    with monkeypatch.context() as patch:
        patch.setattr(card, "card_text", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(head, config, corpus, {}, replace(facts, steps=2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "head").iterdir()} == whole


def test_no_json_of_a_run_lists_ids(chat_target: PreTrainedModel, texts_folder: Path, tmp_path: Path) -> None:
    config = build_config({"target": "tiny", "output": str(tmp_path), "texts": str(texts_folder)})
    head = init_for(chat_target, "eagle3", list(range(30)), own_lm_head=False)
    corpus = load_corpus([texts_folder], 64, 0.2, seed=0)
    publish(head, config, corpus, {}, RunFacts(1, 1, 1.0, "a CPU", 1))
    assert head.config.frequent_tokens
    for path in tmp_path.rglob("*.json"):
        longest = [len(value) for value in json.loads(path.read_text()).values() if isinstance(value, list)]
        assert max(longest, default=0) <= 3


# -- what the user gives -------------------------------------------------------------------------------------


def test_files_of_the_user_that_are_no_text_are_named(tmp_path: Path) -> None:
    for name, read in (("run.yaml", load_config), ("prompts.txt", read_prompts)):
        (tmp_path / name).write_bytes(b"a\xff\xfe")
        with pytest.raises(DamagedFileError, match=rf"{name} .*UTF-8"):
            read(tmp_path / name)
