# SPDX-License-Identifier: Apache-2.0
"""lighteval itself, in an environment of its own: `pytest -m slow tests/harnesses` where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import save_pair
from typer.testing import CliRunner

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of other packages' versions
RECIPE = Path(__file__).parents[2] / "recipes" / "lighteval"
TASK = "polyspec_copying|0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target, small = save_pair(tmp_path_factory.mktemp("models"))
    return str(target), str(small)


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is fetched, or kept: one of lighteval's own tasks downloads a file where it is only listed."""
    import datasets
    from lighteval.tasks.registry import Registry

    for name in ("_load_from_files", "_load_from_subdirs"):
        monkeypatch.setattr(Registry, name, staticmethod(lambda *_: {}))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def evaluate(model: Any, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Scores, and what was answered to each question."""
    from lighteval.logging.evaluation_tracker import EvaluationTracker
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    settings = PipelineParameters(
        launcher_type=ParallelismManager.NONE, custom_tasks_directory=str(RECIPE / "copying.py")
    )  # fmt: skip
    tracker = EvaluationTracker(output_dir=str(folder))
    run = Pipeline(tasks=TASK, pipeline_parameters=settings, evaluation_tracker=tracker, model=model)
    run.evaluate()
    answers = [
        (each.doc.query, each.model_response.text, each.model_response.output_tokens)
        for each in tracker.details_logger.details[TASK]
    ]
    return run.get_results()["results"], answers


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_answers_in_fewer_passes(folders: tuple[str, str], batch: int, tmp_path: Path) -> None:
    from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig

    from hf_polyspec.integrations.lighteval import PolySpecConfig, PolySpecModel

    target, small = folders
    how: dict[str, Any] = {"model_name": target, "dtype": "float32", "batch_size": batch, "cache_dir": str(tmp_path)}
    how["override_chat_template"] = False
    scores, answers = evaluate(TransformersModel(TransformersModelConfig(**how)), tmp_path / "without")
    chain = PolySpecConfig(**how, assistants=f"{small}+suffix", options={"polyspec_block_size": 6})
    model = PolySpecModel(chain)
    found = evaluate(model, tmp_path / "with")
    assert found == (scores, answers)
    assert len({json.dumps(text) for _, text, _ in answers}) == 4  # four different texts
    assert model.tokens >= 4 * 40
    assert model.passes < 0.6 * model.tokens
    # What lighteval keeps of answers is a chain's own.
    again = PolySpecModel(chain)
    assert evaluate(again, tmp_path / "again")[0] == scores
    assert again.passes == 0
    other = PolySpecModel(chain.model_copy(update={"assistants": "suffix"}))
    evaluate(other, tmp_path / "other")
    assert other.passes > 0


def test_a_loaded_model_stays_as_it_is(folders: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hf_polyspec.integrations.lighteval import PolySpecConfig, PolySpecModel

    loaded = AutoModelForCausalLM.from_pretrained(folders[0])
    before = dict(vars(loaded))
    config = PolySpecConfig(model_name=folders[0], batch_size=1, device="cpu", cache_dir=str(tmp_path))
    model = PolySpecModel.from_model(loaded, config)
    evaluate(model, tmp_path)
    assert 0 < model.passes < model.tokens
    assert {name: vars(loaded)[name] is value for name, value in before.items()} == dict.fromkeys(before, True)
    assert vars(loaded).keys() == before.keys()


def test_auto_chooses_in_each_call(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hf_polyspec.integrations.lighteval import PolySpecConfig, PolySpecModel

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "profiles"))
    how: dict[str, Any] = {"model_name": folders[0], "dtype": "float32", "batch_size": 1, "cache_dir": str(tmp_path)}
    model = PolySpecModel(PolySpecConfig(**how, assistants="auto"))
    _, answers = evaluate(model, tmp_path)
    assert len(answers) == 4
    assert 0 < model.passes <= model.tokens
    assert list((tmp_path / "profiles").rglob("*.json"))  # it was measured


def test_the_same_task_is_measured_with_and_without_a_chain(folders: tuple[str, str], tmp_path: Path) -> None:
    from hf_polyspec.bench.measurements.evaluation import PLAIN, measure, questions_of
    from hf_polyspec.bench.measurements.evaluation_harnesses import LightEval
    from hf_polyspec.models.by_name import load_model, load_tokenizer

    target, small = folders
    harness = LightEval(questions_of(3), 24, tmp_path)
    rates, _ = measure(load_model(target), load_tokenizer(target), [f"{small},suffix"], harness, rounds=1, batches=[2])
    assert [rate.alike for rate in rates] == [3] * 4
    assert all(0 < rate.passes < 0.6 * rate.tokens for rate in rates if rate.chain != PLAIN)


def test_what_cannot_work_is_refused_before_anything_is_evaluated(folders: tuple[str, str], tmp_path: Path) -> None:
    from hf_polyspec.integrations.lighteval import PolySpecConfig, PolySpecModel

    how: dict[str, Any] = {"model_name": folders[0], "cache_dir": str(tmp_path)}
    for wrong, said in (
        ({"assistants": "suffix+int8"}, "suffix only drafts"),
        ({"options": {"polyspec_block_size": 0}}, "polyspec_block_size"),
        ({"options": {"block_size": 4}}, "options has block_size; known are"),
        ({"continuous_batching": True}, "continuous_batching has no place for a chain"),
    ):
        with pytest.raises(ValueError, match=said):
            PolySpecModel(PolySpecConfig(**how, **wrong))


def test_the_recipe_runs_in_lightevals_own_command_line(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lighteval.__main__ import app

    monkeypatch.setenv("HOME", str(tmp_path))  # where it keeps answers
    target, small = folders
    chain = tmp_path / "chain.py"
    text = (RECIPE / "chain.py").read_text()
    assert text.count('"int8+suffix"') == 1
    chain.write_text(text.replace('"int8+suffix"', repr(f"{small}+suffix")))
    words = ["custom", target, str(chain), TASK, "--custom-tasks", str(RECIPE / "copying.py")]
    done = CliRunner().invoke(app, [*words, "--output-dir", str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert "polyspec_copying|0" in json.loads(results.read_text())["results"]
