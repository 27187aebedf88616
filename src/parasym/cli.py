"""The front door: `parasym audit`, `parasym fix`, `parasym watch` and `parasym gallery`."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parasym.core.errors import CheckpointError, InputError, MissingExtraError, ParasymError
from parasym.report import words

OK, OPEN, BAD_INPUT, REFUSED, BROKEN = 0, 1, 2, 3, 4
"""Exit codes: all certified; something open; bad input or usage; weights refused; parasym itself failed."""

EXIT_CODES = (
    "[bold]Exit codes[/]  0 every claim is certified and nothing is open · 1 done, but something is undecided, unexplained or failed · "
    "2 the input or the command cannot be used · 3 a weights file was refused · 4 parasym itself failed (--debug shows where)"
)

app = typer.Typer(
    name="parasym",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Find the symmetries in a network's parameters: the directions in which the weights can move and the network stays the same.",
    epilog=(
        "[bold]Start here[/]\n\n"
        "parasym audit model.py:build               a function of yours that returns (model, args)\n\n"
        "parasym audit path/to/hf-folder --html report.html\n\n"
        "parasym fix model.py:build --method compress --out small.safetensors\n\n"
        "parasym watch tail runs/gpt                a training run, live\n\n"
        "parasym gallery list                       the papers that can be run\n\n"
        "parasym sweep probabilistic-stability --over eta=0.05:3:24 --over a=-0.99:0.97:24 --html phases.html\n\n" + EXIT_CODES
    ),
)
gallery = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Run the papers: what theory predicts beside what is measured.", epilog=EXIT_CODES
)
app.add_typer(gallery, name="gallery")
watch = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Read a watched training run: charges beside their predictions, collapse, noise, sharpness. `parasym.watch(model, optimizer)` "
    "in your training script writes it.",
    epilog=(
        "[bold]In your script[/]\n\n"
        'with parasym.watch(model, optimizer, path="runs/gpt") as run:    then train as ever; run.log(loss=loss) adds the loss\n\n'
        "[bold]Beside it, or afterwards[/]\n\n"
        "parasym watch tail runs/gpt\n\n"
        "parasym watch report runs/gpt --html run.html\n\n"
    ),
)
app.add_typer(watch, name="watch")


class Completeness(StrEnum):
    """How to count the free directions."""

    auto = "auto"
    exact = "exact"
    none = "none"


class Backend(StrEnum):
    """Where the cells of a sweep run."""

    loky = "loky"
    ray = "ray"
    dask = "dask"


class Preset(StrEnum):
    """How large a gallery run is."""

    smoke = "smoke"
    default = "default"
    full = "full"


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"parasym {importlib.metadata.version('parasym')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """Hold the options of parasym itself; the commands do the work."""


@app.command(
    epilog=(
        "[bold]Examples[/]\n\n"
        "parasym audit train.py:build_model --weights best.safetensors --html report.html\n\n"
        "parasym audit checkpoints/my-bert                         a Hugging Face folder\n\n"
        "parasym audit 'hf:GPT2Config?n_layer=2&n_embd=64'         an architecture, random weights\n\n"
        "parasym audit model.pt2 --json | jq .completeness         an exported program\n\n"
        "parasym audit model.safetensors --model train.py:build_model\n\n"
        "parasym audit path/to/hf-folder --stream                  weights larger than memory, in one file or many\n\n" + EXIT_CODES
    )
)
def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="file.py:callable or package.module:callable that returns (model, args), a Hugging Face folder, "
            "hf:ConfigClass?option=value, a .pt2 program, or a weights file together with --model.",
        ),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Weights to load first: .safetensors, or .pt/.pth with tensors only.", metavar="FILE")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The network, when TARGET is a weights file.", metavar="TARGET")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report, one self-contained page.", metavar="OUT")] = None,
    as_json: AsJson = False,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    completeness: Annotated[
        Completeness, typer.Option(help="Count the free directions: when affordable, always, or never.")
    ] = Completeness.auto,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read a .safetensors TARGET, an index of shards or a folder a few rows at a time, for weights larger than memory.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Find, name and certify the symmetries of a network, and count what is left over."""
    with _errors_explained(debug):
        if html is not None:
            _check_writable(html)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        load = importlib.import_module("parasym.core.load")
        with _progress() as progress:
            progress("loading", 0.0)
            room = importlib.import_module("parasym.audit")
            if stream:
                loaded = load.load_on_meta(target, model)
                found = room.audit_checkpoint(loaded.model, loaded.args, loaded.kwargs, target, seed=seed, progress=progress)
            else:
                loaded = load.load_target(target, weights, model)
                load.require_inputs(loaded)
                options = {"seed": seed, "progress": progress}
                if loaded.hollow:
                    found = room.audit_checkpoint(loaded.model, loaded.args, loaded.kwargs, **options)
                else:
                    found = room.audit(loaded.model, args=loaded.args, kwargs=loaded.kwargs, completeness=completeness.value, **options)
        if not stream and not target.endswith(".pt2"):
            advise = importlib.import_module("parasym.measure.advice").on_the_command_line
            for row in getattr(found, "advice", ()):
                advise(row, _shell(target, weights, model))
        result = words.plain(found.to_dict())
        for note in loaded.notes:
            typer.echo(f"note: {note}", err=True)
        if html is not None:
            found.to_html(html)
            typer.echo(f"report: {html}", err=True)
        if as_json:
            typer.echo(json.dumps(result, indent=2, allow_nan=False))
        else:
            _show_audit(result)
    raise typer.Exit(OK if words.verdict(result)[0] else OPEN)


Run = Annotated[Path, typer.Argument(metavar="RUN", help="The record of the run, or the folder that holds its watch.sqlite.")]


@watch.command(
    "report",
    epilog=(
        "[bold]Examples[/]\n\n"
        "parasym watch report runs/gpt                      what happened, in the terminal\n\n"
        "parasym watch report runs/gpt --html run.html      one self-contained page with every curve\n\n"
        "parasym watch report runs/gpt --json | jq .charges\n\n"
        "[bold]Exit codes[/]  0 nothing needs you · 1 something does: a charge off its prediction, an alert, a run that died · "
        "2 the record cannot be read · 4 parasym itself failed"
    ),
)
def watch_report(
    run: Run,
    html: Annotated[Path | None, typer.Option(help="Write the page, self-contained.", metavar="OUT")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what happened in a run, finished or live: predicted beside measured, alerts, and what watching cost."""
    with _errors_explained(debug):
        if html is not None:
            _check_writable(html)
        with importlib.import_module("parasym.watch.record").Record.open(run) as record:
            found = words.plain(importlib.import_module("parasym.watch.summary").summary(record))
            if html is not None:
                importlib.import_module("parasym.watch.page").write_run(record, html)
                typer.echo(f"report: {html}", err=True)
        if as_json:
            typer.echo(json.dumps(found, indent=2, allow_nan=False))
        else:
            _show_run(found)
    raise typer.Exit(OK if found["verdict"]["good"] else OPEN)


@watch.command(
    "tail",
    epilog=(
        "[bold]Examples[/]\n\n"
        "parasym watch tail runs/gpt                        a table that follows the run\n\n"
        "parasym watch tail runs/gpt | tee run.log          one line for each observed step\n\n"
        "parasym watch tail runs/gpt --json | jq .rows      one JSON object a line\n\n"
        "It stops at the end of the run, or with Ctrl-C; both exit with 0."
    ),
)
def watch_tail(
    run: Run,
    last: Annotated[int, typer.Option(min=0, help="Begin with so many of the steps recorded before.")] = 10,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks at the record.")] = 1.0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Follow a run while it trains: one line for each observed step, and the alerts."""
    with _errors_explained(debug):
        room = importlib.import_module("parasym.watch.tail")
        console = _console()
        with importlib.import_module("parasym.watch.record").Record.open(run) as record:
            steps = room.follow(record, interval, last)
            try:
                if console.is_terminal and not as_json:
                    _tail_live(console, record, steps, max(last, 10))
                else:
                    _tail_lines(steps, as_json)
            except KeyboardInterrupt:
                typer.echo("stopped; the run goes on", err=True)


@app.command(
    epilog=(
        "[bold]Methods[/]\n\n"
        "balance    rescale so that what every unit receives and sends out has one norm (all charges zero)\n\n"
        "teleport   move along the symmetries to --to minimum-norm, int8 (least damage by rounding to 8 bits), balance, agreement, "
        "sharpness or noise-equilibrium\n\n"
        "compress   cut dead, duplicate and dependent units; the outputs stay\n\n"
        "prune      set the least important weights to zero (SynFlow); no layer collapses\n\n"
        "revive     draw units anew that are dead on any data, or repeat others; the outputs stay (--trust-inputs: on the examples)\n\n"
        "[bold]What data they need[/]\n\n"
        "any inputs of the right shapes, TARGET's own: balance, minimum-norm, agreement, prune, compress, revive\n\n"
        "inputs like those in training: compress and revive with --trust-inputs (a unit is dead if these never switch it on), int8\n\n"
        "a loss and its data, by --data: sharpness and noise-equilibrium; agreement may have them, and then judges by the loss midway\n\n"
        "a loss or a training run, so Python calls: snip and grasp scores; syre, dcs, spred (parasym.methods.prune, syre, dcs, spred); "
        "`parasym audit` prints the line for what it finds.\n\n"
        "Of a .pt2 program the weights are written under their names in the network it was made from: load them there, export again.\n\n"
        "[bold]Examples[/]\n\n"
        "parasym fix train.py:build_model --weights best.safetensors --method compress --out small.safetensors\n\n"
        "parasym fix checkpoints/my-bert --method balance --out balanced.safetensors\n\n"
        "parasym fix checkpoints/my-llama --method teleport --to int8 --out int8-ready.safetensors\n\n"
        "parasym fix net.py:build --weights b.safetensors --method teleport --to agreement --reference a.safetensors "
        "--out b-like-a.safetensors\n\n"
        "parasym fix net.py:build --method prune --keep 0.1 --out sparse.safetensors\n\n"
        "parasym fix net.py:build --method teleport --to noise-equilibrium --data net.py:loss_and_data --batch-size 32 "
        "--out calm.safetensors\n\n"
        "[bold]Exit codes[/]  0 written, and its certificate holds · 1 the certificate does not hold, nothing was written · "
        "2 the input or the command cannot be used · 3 a weights file was refused · 4 parasym itself failed (--debug shows where)"
    )
)
def fix(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="As for `parasym audit`, with weights.")],
    method: Annotated[str, typer.Option(help="What to do: balance, teleport, compress, prune or revive; see below.")],
    out: Annotated[Path, typer.Option(help="Where the new weights go.", metavar="FILE.safetensors")],
    weights: Annotated[
        Path | None, typer.Option(help="Weights to load first: .safetensors, or .pt/.pth with tensors only.", metavar="FILE")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The network, when TARGET is a weights file.", metavar="TARGET")] = None,
    to: Annotated[
        str | None,
        typer.Option(help="teleport: minimum-norm, int8, balance, agreement, sharpness or noise-equilibrium.", metavar="AIM"),
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="teleport --to agreement: the checkpoint to agree with.", metavar="FILE")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="teleport: a function without arguments that returns (loss_fn, (inputs, targets)); for aims that need a loss.",
            metavar="FILE.py:FUNCTION",
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="teleport --to noise-equilibrium: of the SGD meant.", min=1)] = None,
    keep: Annotated[float | None, typer.Option(help="prune: fraction of the weights to keep, such as 0.1.")] = None,
    score: Annotated[str, typer.Option(help="prune: synflow, magnitude or random.")] = "synflow",
    trust_inputs: Annotated[
        bool, typer.Option("--trust-inputs", help="compress, revive: what is dead on the example inputs counts as dead.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over FILE if it exists.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Apply a remedy that needs no training, certify it, and write the new weights; TARGET is not touched."""
    with _errors_explained(debug):
        _check_new_weights(out, force)
        room = importlib.import_module("parasym.methods.fix")
        wish = room.Wish(method, to, reference, keep, score, trust_inputs, seed, data, batch_size)
        room.check(wish)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        load = importlib.import_module("parasym.core.load")
        with _progress() as progress:
            progress("loading", 0.0)
            loaded = load.load_target(target, weights, model)
            if loaded.hollow:
                raise InputError(f"{target} is too large to be held here, so there are no weights to act on.")
            load.require_inputs(loaded)
            fixed = room.fix(loaded, wish, progress)
            if fixed.ok:
                progress("writing", 1.0)
                room.write(fixed, out)
        for note in (*loaded.notes, *fixed.notes):
            typer.echo(f"note: {note}", err=True)
        if as_json:
            typer.echo(json.dumps({**fixed.to_dict(), "out": str(out) if fixed.ok else None}, indent=2, allow_nan=False))
        else:
            _show_fix(room.lines(fixed), fixed, out)
    raise typer.Exit(OK if fixed.ok else OPEN)


def _shell(target: str, weights: Path | None, model: str | None) -> str:
    """TARGET and its options as they are typed in a shell."""
    options = [*(("--weights", str(weights)) if weights else ()), *(("--model", model) if model else ())]
    return shlex.join([target, *options])


def _check_new_weights(out: Path, force: bool) -> None:
    if out.suffix != ".safetensors":
        _fail(f"--out {out}: weights are written as safetensors; end the name in .safetensors.", BAD_INPUT)
    _check_writable(out)
    if out.exists() and not force:
        _fail(f"{out} exists. Give another name, or --force to write over it.", BAD_INPUT)


def _show_fix(lines: Sequence[tuple[str, str]], fixed: Any, out: Path) -> None:
    console = _console()
    table = _table("", "")
    table.show_header = False
    for what, value in lines:
        table.add_row(Text(what, "bold"), Text(value))
    console.print(table)
    if not fixed.ok:
        console.print(Text("nothing was written: the certificate does not hold", "red"))
    elif fixed.changed:
        console.print(Text(f"written: {out}", "green"))
    else:
        console.print(Text(f"there was nothing to do; {out} holds the weights as they were", "yellow"))


@gallery.command("list")
def gallery_list(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the papers that can be run, and what each claims."""
    with _errors_explained(debug):
        entries = importlib.import_module("parasym.gallery").entries()
        rows = [
            {"slug": entry.slug, "title": entry.title, "paper": entry.paper, "claims": list(entry.claims)} for entry in entries.values()
        ]
        if as_json:
            typer.echo(json.dumps(rows, indent=2))
            return
        table = _table("paper", "title", "claims")
        for entry in entries.values():
            table.add_row(Text(entry.slug, "bold"), f"{entry.title}\n{entry.paper}", "\n".join(f"· {claim}" for claim in entry.claims))
        _console().print(table)


@gallery.command("run")
def gallery_run(
    slug: Annotated[str, typer.Argument(help="A paper of `parasym gallery list`.")],
    preset: Annotated[
        Preset, typer.Option(help="smoke: seconds; default: up to a minute; full: the paper's own setting.")
    ] = Preset.default,
    store: Annotated[
        Path | None, typer.Option(help="Folder that keeps finished experiments: a run that was killed takes up there.", metavar="DIR")
    ] = None,
    workers: Annotated[int, typer.Option(help="Experiments at a time.", min=1)] = 1,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a paper and compare each prediction with its measurement; exits with 0 only if all agree."""
    with _errors_explained(debug):
        room = importlib.import_module("parasym.gallery")
        _known_paper(room, [slug])
        result = room.run(slug, preset.value, store, jobs=workers)
        if as_json:
            typer.echo(json.dumps(words.plain(result.to_dict()), indent=2, allow_nan=False))
        else:
            _show_result(result)
    raise typer.Exit(OK if result.passed else OPEN)


@gallery.command("report")
def gallery_report(
    outdir: Annotated[Path, typer.Argument(help="Folder for the pages.", metavar="OUTDIR")],
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers to run; all of them if none is named.", metavar="[SLUG]...")] = None,
    preset: Annotated[Preset, typer.Option(help="smoke: seconds; default: up to a minute; full: the paper's own setting.")] = Preset.smoke,
    debug: Debug = False,
) -> None:
    """Run papers and write their pages; exits with 0 only if all checks pass."""
    with _errors_explained(debug):
        room = importlib.import_module("parasym.gallery")
        _known_paper(room, slugs or [])
        chosen = slugs or list(room.entries())
        results = []
        with _progress() as progress:
            for index, slug in enumerate(chosen):
                progress(slug, index / len(chosen))
                results.append(room.run(slug, preset.value))
        page = room.report(outdir, results)
        for result in results:
            good = sum(check.passed for check in result.checks)
            typer.echo(f"{'pass' if result.passed else 'FAIL'}  {result.slug}  {good}/{len(result.checks)} checks")
        typer.echo(f"report: {page or outdir}", err=True)
    raise typer.Exit(OK if all(result.passed for result in results) else OPEN)


@app.command(
    "sweep",
    epilog=(
        "[bold]Examples[/]\n\n"
        "parasym sweep probabilistic-stability                      what it offers by default, with its axes\n\n"
        "parasym sweep probabilistic-stability --over eta=0.05:3:100 --over a=-0.99:0.97:100 --set steps=10000 --workers 2\n\n"
        "parasym sweep probabilistic-stability --over S=1,2,4,8,16 --set eta=1 --set a=-0.8 --json\n\n"
        "parasym sweep law-of-balance --experiment law --over eta=0.001:0.05:5:log     any experiment, over any field\n\n" + EXIT_CODES
    ),
)
def run_sweep(
    slug: Annotated[str, typer.Argument(help="A paper of `parasym gallery list`.")],
    over: Annotated[
        list[str] | None,
        typer.Option(help="A field and its values: 0.1,0.2,0.5 or low:high:count or low:high:count:log.", metavar="FIELD=VALUES"),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A field that stays fixed.", metavar="FIELD=VALUE")] = None,
    name: Annotated[str | None, typer.Option("--sweep", help="Which of the paper's sweeps; the first if none is named.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Sweep one of the paper's experiments: how its checks fare.")] = None,
    preset: Annotated[Preset, typer.Option(help="The preset an --experiment starts from.")] = Preset.smoke,
    workers: Annotated[int, typer.Option(help="Processes, or tasks at a time on a cluster.", min=1)] = 1,
    backend: Annotated[Backend, typer.Option(help="This machine (loky), or a Ray or Dask cluster.")] = Backend.loky,
    address: Annotated[str | None, typer.Option(help="Address of a running cluster.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="File that keeps finished cells; the same command takes up where it was killed.", metavar="FILE")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the diagrams, one self-contained page.", metavar="OUT")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a paper's model over a grid and draw its phase diagram, the predicted boundary on top."""
    with _errors_explained(debug):
        if html is not None:
            _check_writable(html)
        room = importlib.import_module("parasym.gallery")
        _known_paper(room, [slug])
        sweeps = importlib.import_module("parasym.gallery.sweep")
        offered = sweeps.offered(room.entries()[slug], name, experiment, preset.value)
        axes = dict(sweeps.parse_axis(text) for text in over or [])
        fixed = dict(sweeps.parse_setting(text) for text in settings or [])
        kept = store or Path(".parasym") / f"sweep-{slug}.sqlite"
        with _progress() as progress:
            found = sweeps.sweep(
                slug, offered, axes, fixed, store=str(kept), workers=workers, backend=backend.value, address=address,
                progress=lambda done, of: progress(f"{done}/{of} cells", done / of),
            )  # fmt: skip
        if html is not None:
            sweeps.page(html, found)
            typer.echo(f"diagrams: {html}", err=True)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        else:
            _show_sweep(found)
        typer.echo(f"cells are kept in {kept}", err=True)
    raise typer.Exit(OK)


def _show_sweep(found: Any) -> None:
    console = _console()
    axes = ", ".join(f"{name} ({len(values)} from {min(values):g} to {max(values):g})" for name, values in found.axes.items())
    console.print(Text(f"{found.slug}: {found.title}", "bold"))
    console.print(Text(f"{len(found.cells):,} cells over {axes}; " + ", ".join(f"{k} {v}" for k, v in found.config.items()), "dim"))
    table = _table("quantity", "measured", "boundary", "cells on the predicted side", right={"cells on the predicted side"})
    for q in found.quantities:
        seen, side = found.values(q.name), found.agreement(q)
        numbers = seen[seen == seen]
        extent = " to ".join(words.number(float(v)) for v in (numbers.min(), numbers.max())) if numbers.size else "nothing"
        share = f"{words.percent(side['share'])} of {side['cells']:,} (by chance {words.percent(side['chance'])})" if side else ""
        table.add_row(q.title, extent, "" if q.level is None else words.number(q.level), share)
    console.print(table)
    if found.diverged:
        console.print(Text(f"{found.diverged:,} replicas left the range of numbers; each cell says how many (--json)"))


def _known_paper(room: Any, slugs: Sequence[str]) -> None:
    known = room.entries()
    for slug in slugs:
        if slug not in known:
            _fail(f"The gallery has no paper {slug!r}. It has: {', '.join(sorted(known))}.", BAD_INPUT)


def _show_audit(audit: Mapping[str, Any]) -> None:
    """Print an audit so that it is read in a minute: verdict, symmetries, completeness, collapse, open ends, advice."""
    console = _console()
    model, complete = audit["model"], audit.get("completeness") or {}
    good, sentence = words.verdict(audit)
    console.print(Text(f"{model['name']}: {model['parameters']:,} parameters in {model['tensors']} tensors, {model['mode']} mode", "bold"))
    console.print(
        Text(
            f"traced by {model['trace']}; {model['inputs']}; seed {model['seed']}"
            + (f"; twin: {model['twin']}" if model.get("twin") else ""),
            "dim",
        )
    )
    console.print(Text(sentence, "green" if good else "yellow"))
    console.print()

    rows = words.fold(audit["symmetries"])
    table = _table("symmetry", "where", "group", "dim", "what it means", "certificate", right={"dim", "certificate"})
    for row in rows:
        times = f" ×{row.count}" if row.count > 1 else ""
        stamp = Text(words.number(row.residual), "green") if row.certified else Text(f"none ({words.number(row.residual)})", "red")
        table.add_row(
            Text(row.name + times, "bold"),
            row.where or "(all)",
            row.group,
            "–" if row.kind == "discrete" else words.number(row.dim),
            row.meaning,
            stamp,
        )
    console.print(table if rows else Text("No symmetries were found.", "bold"))
    if rows:
        console.print(
            Text(
                f"certificate: largest relative change of the outputs under finite moves; at most {words.CERTIFIED_BELOW:g} certifies",
                "dim",
            )
        )

    if complete.get("nullity") is not None:
        console.print(
            f"\ncompleteness: {words.percent(complete.get('explained'))} of {complete['nullity']:,} free directions explained; "
            f"rank {words.number(complete.get('rank'))} of {complete['parameters']:,} ({complete.get('method', '')}"
            + (")" if complete.get("exact") else ", an estimate)")
        )
    classified = audit.get("classified")
    if classified:
        console.print("parameters: " + ", ".join(f"{count:,} {kind}" for kind, count in classified.items()))

    collapse = [item for item in audit.get("collapse") or [] if item["kind"] != "not measured"]
    passed_over = [{"name": item["where"], "why": item["note"]} for item in audit.get("collapse") or [] if item["kind"] == "not measured"]
    if collapse:
        console.print()
        limit = 12
        table = _table("collapsed", "where", "units", "parameters lost", "", right={"parameters lost"})
        for item in sorted(collapse, key=lambda item: -(item.get("parameters_lost") or 0))[:limit]:
            table.add_row(
                Text(item["kind"], "bold"),
                item["where"],
                f"{words.number(item.get('count'))} of {words.number(item.get('of'))}",
                words.number(item.get("parameters_lost")),
                "; ".join(filter(None, [item.get("note"), "can be removed" if item.get("removable") else ""])),
            )
        console.print(table)
        if len(collapse) > limit:
            console.print(Text(f"and {len(collapse) - limit} more (--json or --html lists them)", "dim"))
    _show_list(console, "Collapse not measured", passed_over, lambda item: "")
    for key, title, detail in (
        ("undecided", "Undecided", lambda item: f"{item.get('dim')} directions"),
        ("approximate", "Approximate", lambda item: f"ratio {words.number(item.get('ratio'))}"),
        ("refuted", "Refuted", lambda item: ""),
    ):
        _show_list(console, title, audit.get(key) or [], detail)
    if audit.get("advice"):
        console.print(Text("\nAdvice", "bold"))
        for item in audit["advice"]:
            style = {"high": "bold red", "medium": "yellow"}.get(item["severity"], "cyan")
            console.print(
                Text.assemble(
                    (f"{item['severity']:>6}  ", style), (item["what"], "bold"), f" ({item['where']})" if item.get("where") else ""
                )
            )
            console.print(Text(f"        {item['why']}"))
            if item.get("command"):
                console.print(Text(f"        $ {item['command']}", "green"))
            if item.get("training"):
                console.print(Text(f"        in training: {item['training']}", "cyan"))


def _show_list(
    console: Console, title: str, items: Sequence[Mapping[str, Any]], detail: Callable[[Mapping[str, Any]], str], limit: int = 8
) -> None:
    if not items:
        return
    console.print(Text(f"\n{title}", "bold"))
    for item in items[:limit]:
        more = detail(item)
        console.print(Text(f"  {item['name']}{f' ({more})' if more else ''}: {item['why']}"))
    if len(items) > limit:
        console.print(Text(f"  and {len(items) - limit} more (--json or --html lists them)", "dim"))


def _show_result(result: Any) -> None:
    console = _console()
    table = _table(
        "", "claim", "predicted", "measured", "error", "tolerance", right={"error", "tolerance"}, title=f"{result.slug} ({result.preset})"
    )
    for check in result.checks:
        mark = Text("pass", "green") if check.passed else Text("FAIL", "bold red")
        kind = "" if check.kind == "match" else f" ({check.kind})"
        bound = "" if check.relation == "=" else f"{check.relation} "
        table.add_row(
            mark,
            check.claim + kind,
            bound + _values(check.predicted),
            _values(check.measured),
            words.number(check.error),
            words.number(check.tolerance),
        )
    console.print(table)
    good = sum(check.passed for check in result.checks)
    console.print(Text(f"{good} of {len(result.checks)} checks passed in {result.seconds:.1f} s", "green" if result.passed else "bold red"))


def _show_run(found: Mapping[str, Any], limit: int = 15) -> None:
    """Print a run: verdict, alerts, charges, and the last value of everything else."""
    room = importlib.import_module("parasym.watch.summary")
    console, meta = _console(), found["meta"]
    console.print(Text(f"{meta.get('model', found['path'])}: {found['state']}, {room.duration(found['seconds'])}", "bold"))
    if found["last_step"] is not None:
        text = f"steps {found['first_step']:,} to {found['last_step']:,}, {found['observations']:,} observed; {meta.get('optimizer', '')}"
        if found["superseded"]:
            text += f"; {found['superseded']:,} rows beyond the checkpoints it was resumed from are left out"
        console.print(Text(text, "dim"))
    console.print(Text(found["verdict"]["sentence"], "green" if found["verdict"]["good"] else "yellow"))
    alerts = sorted(found["alerts"], key=lambda item: ("high", "warn", "info").index(item["severity"]))
    for item in alerts[:limit]:
        console.print(_alert(item))
    if len(alerts) > limit:
        console.print(Text(f"and {len(alerts) - limit} more alerts (--json or --html lists them)", "dim"))
    if found["charges"]:
        console.print()
        table = _table("charge", "where", "measured", "predicted", "error", "", right={"measured", "predicted", "error"})
        for item in found["charges"][:limit]:
            mark = (
                Text("breaks its law", "bold red") if item["violated"]
                else Text("not predicted", "dim") if item["follows"] is None
                else Text("as predicted", "green") if item["follows"] else Text("off", "yellow")
            )  # fmt: skip
            numbers = (words.number(item["last"], 4), words.number(item["predicted"], 4), room.share(item["error"]))
            table.add_row(Text(item["name"], "bold"), item["where"] or "(all)", *numbers, mark)
        console.print(table)
        if len(found["charges"]) > limit:
            console.print(Text(f"and {len(found['charges']) - limit} charges with smaller errors (--json or --html lists them)", "dim"))
    table = _table("", "where", "first", "last", "lowest", "highest", right={"first", "last", "lowest", "highest"})
    for kind in ("loss", "collapse", "noise", "sharpness", "norm", "rate"):
        members = [item for item in found[kind] if kind != "norm" or not item["where"]]
        for item in members[:limit]:
            say = room.share if kind == "collapse" else lambda value: words.number(value, 4)
            table.add_row(
                Text(item["name"], "bold"), item["where"] or "(all)", *(say(item[key]) for key in ("first", "last", "low", "high"))
            )
    if table.row_count:
        console.print()
        console.print(table)
    console.print(Text(f"\nwatching took {room.share(found['cost']['overhead'])} of the run's time ({found['cost']['note']})", "dim"))


def _alert(item: Mapping[str, Any]) -> Text:
    style = {"high": "bold red", "warn": "yellow"}.get(item["severity"], "cyan")
    text = Text.assemble((f"{item['severity']:>6}  ", style), f"step {item['step']:,}: {item['message']}")
    return text if not item["remedy"] else text + Text(f"\n        {item['remedy']}", "green")


def _tail_lines(steps: Iterator[Any], as_json: bool) -> None:
    """One line for each step, for a pipe or a log; JSON if wanted."""
    room = importlib.import_module("parasym.watch.tail")
    for item in steps:
        if isinstance(item, room.Step) and as_json:
            print(json.dumps(item.to_dict(), allow_nan=False), flush=True)
        elif isinstance(item, room.Step):
            if item.points:
                print(room.line(item), flush=True)
            for alert in item.alerts:
                print(_alert({**vars(alert)}).plain, flush=True)
        elif isinstance(item, str):
            print(json.dumps({"end": item}) if as_json else f"the run is over: {item}", flush=True)


def _tail_live(console: Console, record: Any, steps: Iterator[Any], height: int) -> None:
    """A table of the last steps that redraws itself."""
    from rich.console import Group
    from rich.live import Live

    room = importlib.import_module("parasym.watch.tail")
    name, ended = str(record.meta.get("model", record.path)), ""
    shown: list[tuple[int, dict[str, str]]] = []
    alerts: list[dict[str, Any]] = []

    def view() -> Group:
        keys = [key for key in room.COLUMNS if any(key in values for _, values in shown)]
        table = _table("step", *keys, right={"step", *keys})
        for number, values in shown[-height:]:
            table.add_row(f"{number:,}", *(values.get(key, "") for key in keys))
        status = Text(f"the run is over: {ended}", "bold") if ended else Text("following; Ctrl-C stops", "dim")
        return Group(
            Text(f"{name}  {record.path}", "bold"), table if shown else Text("nothing recorded yet"), *map(_alert, alerts[-4:]), status
        )

    with Live(view(), console=console, auto_refresh=False) as live:
        for item in steps:
            if isinstance(item, room.Step):
                if item.points:
                    shown.append((item.step, room.columns(item)))
                alerts += [vars(alert) for alert in item.alerts]
                del shown[:-height], alerts[:-4]
            elif isinstance(item, str):
                ended = item
            live.update(view(), refresh=item is None or isinstance(item, str))


def _values(values: Sequence[float], limit: int = 4) -> str:
    return ", ".join(words.number(value, 4) for value in values[:limit]) + (f", … ({len(values)})" if len(values) > limit else "")


def _console() -> Console:
    """Standard output; names are printed as they are, whatever brackets they hold. A pipe gets wide lines."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(markup=False, highlight=False, width=160)


def _table(*columns: str, right: frozenset[str] | set[str] = frozenset(), title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Give a callback (stage, fraction 0..1) that draws a bar on standard error, when that is a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, fraction: bar.update(task, description=stage, completed=min(max(fraction, 0.0), 1.0))


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.resolve().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else "its folder does not exist"
        _fail(f"Cannot write {path}: {reason}. Give a file in a folder that exists.", BAD_INPUT)


@contextmanager
def _errors_explained(debug: bool) -> Iterator[None]:
    """Turn errors into one paragraph on standard error and an exit code; ``debug`` lets the traceback through."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        raise typer.Exit(OK) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, CheckpointError):
            _fail(str(error), REFUSED)
        if isinstance(error, MissingExtraError | ParasymError):
            _fail(str(error), BAD_INPUT)
        _fail(
            f"parasym failed unexpectedly: {type(error).__name__}: {error}."
            + ("" if debug else " Run the same command with --debug to see where."),
            BROKEN,
        )


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
