# SPDX-License-Identifier: Apache-2.0
"""`polyspec plan` from end to end on tiny models, and the plan it writes in `polyspec generate`."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_pair
from tiny_models import noisy, prompts, tiny
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

import hf_polyspec
from hf_polyspec.cli import app, demo
from hf_polyspec.eagle import init_for
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal, TreeProposal
from hf_polyspec.host.lending import WORTH, is_copy
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.planning import Plan, Wish, draw_plan, make_plan
from hf_polyspec.planning.agreement import TREES
from hf_polyspec.planning.candidates import options_of
from hf_polyspec.planning.replay import Chain, replay
from hf_polyspec.quantization import is_packed

ALL = 1e6
"""Seconds in which a drafter can draft from every place of a text, however busy the machine."""
QUICK = ("--new-tokens", "12", "--repeats", "1", "--no-batches", "--draft-seconds", "0.2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target, small = save_pair(tmp_path_factory.mktemp("plan"))
    return str(target), str(small)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_command_measures_chooses_runs_and_writes(
    folders: tuple[str, str], tmp_path: Path, temperature: str
) -> None:
    (tmp_path / "prompts.txt").write_text("abcabcabc\nthe cat and the cat\n")
    out, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    levels = ("--model", folders[0], "--assistant", folders[1], "--assistant", "suffix")
    files = ("--prompts", str(tmp_path / "prompts.txt"), "--out", str(out), "--plot", str(picture))
    result = run("plan", *levels, *QUICK, *files, "--verify", "--temperature", temperature)
    assert result.exit_code == 0, result.output
    assert re.search(r"^\s+\*\s", result.output, re.MULTILINE)
    assert re.search(r"[+-]\d+\.\d %", result.output)
    assert "Best: " in result.output
    for name in ("plain generate()", "small", "suffix", "small + suffix"):
        assert name in result.output
    plan = Plan.load(out)
    assert sum(row["measured"] is not None for row in plan.candidates) == 5
    assert plan.costs["target"]["rounds"][0][-1] > 0
    assert picture.stat().st_size > 10_000
    assert picture.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    answered = run("generate", "abcabc", *levels, "--max-new-tokens", "8", "--plan", str(out))
    assert answered.exit_code == 0, answered.output


def test_batches_are_a_table_a_sentence_and_a_plot(folders: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("abcabcabc\n")
    quick = [word for word in QUICK if word != "--no-batches"]
    files = ("--prompts", str(tmp_path / "prompts.txt"), "--plot", str(tmp_path / "plan.png"))
    result = run("plan", "--model", folders[0], "--assistant", "suffix", *quick, *files)
    assert result.exit_code == 0, result.output
    for rows in (1, 2, 4, 8):
        assert re.search(rf"^ ?{rows} +(suffix|plain generate\(\)) .*x *$", result.output, re.MULTILINE), rows
    assert re.search(r"pay up to 8 rows at least|rows on, plain decoding|at any of these batch sizes", result.output)
    assert (tmp_path / "plan.svg").stat().st_size > 10_000


def test_a_plan_of_a_packed_model_packs_it_again(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plan.json"
    levels = ("--model", folders[0], "--assistant", "suffix")
    result = run("plan", *levels, *QUICK, "--pack", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert Plan.load(out).packed
    packed: list[bool] = []
    answer = demo.answer

    def watching(target: PreTrainedModel, *arguments: Any, **named: Any) -> Any:
        packed.append(is_packed(target))
        return answer(target, *arguments, **named)

    monkeypatch.setattr(demo, "answer", watching)
    for words in (("--plan", str(out)), ("--pack",), ()):
        answered = run("generate", "abcabc", *levels, "--max-new-tokens", "8", *words)
        assert answered.exit_code == 0, answered.output
    assert packed == [True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "temperature must be"),
        (("--new-tokens", "1"), "new_tokens must be"),
        (("--out", "/no/such/folder/plan.json"), "--out: the folder"),
        (("--plot", "/no/such/folder/plan.png"), "--plot: the folder"),
        (("--prompts", "/no/such/file.txt"), "no file of prompts"),
        (("--assistant", "synthetic:2", "--assistant", "suffix"), "from 0 to 1"),
        (("--assistant", "auto"), "'auto' chooses levels by itself, and here each level has to be named"),
        (("--assistant", "none"), "'none' stands for no level at all"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(arguments: tuple[str, ...], message: str) -> None:
    levels = ("--model", "no-such-model", "--assistant", "suffix")
    if "--assistant" in arguments:
        levels = levels[:2]
    result = run("plan", *levels, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def rounded(target: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model as `lending` knows them: other numbers in its matrices, all else alike."""
    other = copy.deepcopy(target)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in other.model.layers:
            weight = layer.mlp.down_proj.weight
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    assert is_copy(other, target)
    return other


@pytest.mark.parametrize("lends", [False, True])
def test_a_replay_counts_the_rounds_that_really_happen(lends: bool) -> None:
    """Greedy: the target's rounds exactly, a middle's within what it does after it has left the text."""
    target = tiny("llama")
    middle = rounded(target) if lends else noisy(target, 0.01, 1)
    small = noisy(target, 0.05, 2)
    # A copy takes what the target has read of a long prompt, and is not asked before.
    texts = [prompts(1, WORTH + 4 if lends else 9, seed=seed)["input_ids"][0].tolist() for seed in range(4)]
    wish = Wish(new_tokens=32, repeats=1, draft_seconds=ALL, batches=False)
    found = make_plan(target, [middle, small, SuffixDrafter()], texts, wish)
    members = [target, middle, small, SuffixDrafter()]
    for chain in (Chain((0, 2), 0, 4), Chain((0, 3), 0, 24), Chain((0, 1, 2), 6, 3), Chain((0, 1, 3), 4, 24)):
        predicted = replay(chain, found.measured)
        rounds = [0] * len(chain.levels)
        for ids in texts:
            output = hf_polyspec.generate(
                target,
                torch.tensor([ids]),
                assistant_models=[members[place] for place in chain.levels[1:]],
                generation_config=found.config,
                **options_of(chain),
            )
            for i, level in enumerate(output.polyspec.levels):
                rounds[i] += level.rounds
        assert predicted.rounds[0] == pytest.approx(rounds[0]), chain
        for middle_rounds, real in zip(predicted.rounds[1:-1], rounds[1:-1], strict=True):
            assert middle_rounds == pytest.approx(real, rel=0.06), chain


class PromptReader(Drafter):
    """Offers what stood behind the last id in what it was shown before it was first asked, which is the prompt."""

    name = "prompt reader"

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.prompt: list[int] = []
        self.asked = False

    def watch(self, passed: Pass) -> None:
        self.prompt = self.prompt if self.asked else list(passed.read[0])

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        self.asked = bool(self.prompt)  # before the first pass nothing is known
        last = context.ids[0][-1]
        place = self.prompt.index(last) if last in self.prompt else len(self.prompt)
        tokens = self.prompt[place + 1 : place + 1 + limits[0]]
        return Proposal([tokens], None, [[self.index] * len(tokens)])


def test_what_is_made_of_a_prompt_is_not_made_of_the_answer() -> None:
    target = tiny("llama")
    texts = [prompts(1, seed=seed)["input_ids"][0].tolist() for seed in range(2)]
    found = make_plan(target, [PromptReader()], texts, Wish(new_tokens=32, repeats=1, draft_seconds=ALL, batches=False))
    real = [
        hf_polyspec.generate(
            target, torch.tensor([ids]), assistant_models=[PromptReader()], generation_config=found.config,
            num_assistant_tokens=4,
        ).polyspec.levels[0].rounds
        for ids in texts
    ]  # fmt: skip
    assert replay(Chain((0, 1), 0, 4), found.measured).rounds[0] == pytest.approx(sum(real))


@pytest.mark.parametrize("direct", [1, 3, 8])
def test_drafts_that_pass_a_middle_by_are_replayed(direct: int) -> None:
    """How a drafter that adapts would have fared is known but roughly: within a tenth."""
    target = tiny("llama")
    middle = noisy(target, 0.01, 1)
    texts = [prompts(1, seed=seed)["input_ids"][0].tolist() for seed in range(4)]
    wish = Wish(new_tokens=48, repeats=1, draft_seconds=ALL, batches=False)
    found = make_plan(target, [middle, SuffixDrafter(min_probability=0.02)], texts, wish)
    rounds = {}
    for chain in (Chain((0, 1, 2), 4, 24, direct=direct), Chain((0, 1, 2), 4, 24)):
        real = [0, 0]
        for ids in texts:
            output = hf_polyspec.generate(
                target,
                torch.tensor([ids]),
                assistant_models=[middle, SuffixDrafter(min_probability=0.02)],
                generation_config=found.config,
                **options_of(chain),
            )
            real = [total + level.rounds for total, level in zip(real, output.polyspec.levels, strict=False)]
        predicted = replay(chain, found.measured).rounds[:2]
        assert predicted == pytest.approx(real, rel=0.1), chain
        rounds[chain.direct] = predicted
    assert rounds[direct][1] < rounds[0][1]


def test_trees_that_are_right_to_their_last_depth_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny("llama")
    ids = prompts(1)["input_ids"][0].tolist()
    text = target.generate(torch.tensor([ids]), max_new_tokens=14, do_sample=False, eos_token_id=None)[0].tolist()

    def know_all(drafter: EagleDrafter, context: Context, limits: list[int], law: object) -> TreeProposal | None:
        start, depth = len(context.ids[0]), min(limits[0], drafter.tree_depth)
        nodes = text[start : start + depth]
        return TreeProposal([nodes], [list(range(-1, len(nodes) - 1))], [[1] * len(nodes)]) if nodes else None

    monkeypatch.setattr(EagleDrafter, "propose_tree", know_all)
    wish = Wish(new_tokens=10, repeats=1, draft_seconds=ALL, batches=False)
    found = make_plan(target, [init_for(target, "eagle3").eval()], [ids], wish, names=["target", "head"])
    for tree in TREES:
        ratios = found.measured.drafts[0, 1, tree].drafts[0].logs
        assert ratios.shape == (10, tree.depth)
        # All of the depth is right, except where the text leaves no room for it.
        assert [int((row == 0.0).sum()) for row in ratios] == [min(tree.depth, 9 - start) for start in range(10)]


def test_heads_are_recorded_as_chains_and_trees_and_sampling_is_planned(tmp_path: Path) -> None:
    target = tiny("llama")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        head = init_for(target, "eagle3").eval()
    texts = [prompts(1)["input_ids"][0].tolist()]
    wish = Wish(temperature=0.8, new_tokens=10, repeats=1, draft_seconds=ALL, batches=False)
    found = make_plan(target, [noisy(target), head], texts, wish, names=["target", "middle", "head"])
    record = found.measured.drafts[0, 2, None]
    assert record.drawn
    assert record.blind_first
    assert [tokens for tokens, seconds in record.seconds.points if seconds > 0] == [1, 2, 4, 8]
    for tree in TREES:
        assert found.measured.drafts[1, 2, tree].checking > 0
    plan = found.plan()
    assert plan.temperature == 0.8
    assert any("tree" in name for name in plan.acceptance)
    for file in draw_plan(found, tmp_path / "head.svg"):
        assert file.stat().st_size > 10_000
