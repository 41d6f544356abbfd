"""`nvila train`: recipes, stages, fine-tuning, pruning, export, tables."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.cli import show
from nvila.errors import InvalidRequest

if TYPE_CHECKING:
    from nvila.train.loop import Outcome
    from nvila.train.recipes import Recipe

SAY_EVERY_S = 15.0
"""Where no progress bar can move, a line is written this often."""


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "recipes": _recipes,
        "recipe": _recipe,
        "all": _all,
        "finetune": _finetune,
        "prune": _prune,
        "export": _export,
        "ablate": _ablate,
        "speed": _speed,
    }
    actions[args.action](args)
    return 0


def _recipes(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from nvila.train.recipes import RECIPES, recipe_named

    if args.name or args.json:
        chosen = [recipe_named(args.name)] if args.name else [make() for make in RECIPES.values()]
        show.print_json(chosen[0].to_json() if args.name else [recipe.to_json() for recipe in chosen])
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("recipe", "trains", "lr", "rows × positions", "lasts", "precision"):
        table.add_column(title)
    for make in RECIPES.values():
        recipe = make()
        length = recipe.duration
        lasts = f"{length.steps} steps" if length.steps else f"{length.epochs:g} epochs"
        lasts = f"{length.seconds:.0f} s" if length.seconds else lasts
        trains = "+".join([*recipe.trained, *(["LoRA"] if recipe.adapters else [])])
        rows = f"{recipe.batch.rows} × {recipe.batch.row_positions:,}"
        table.add_row(recipe.name, trains, f"{recipe.optim.lr:g}", rows, lasts, recipe.precision)
    Console(highlight=False).print(table)


# -- stages -----------------------------------------------------------------------------------------------------------


def _recipe(args: argparse.Namespace) -> None:
    from nvila.train.recipes import recipe_named

    recipe = _changed(recipe_named(args.name), args)
    _train((recipe,), _start(args, recipe.name), args)


def _all(args: argparse.Namespace) -> None:
    from nvila.train.recipes import family

    stages = tuple(_changed(recipe, args) for recipe in family(args.family, minutes=args.minutes))
    _train(stages, _start(args, args.family), args)


def _finetune(args: argparse.Namespace) -> None:
    from nvila.cli.checkpoint import find_model
    from nvila.train.recipes import finetuning

    if not args.data:
        raise InvalidRequest("say which conversations to tune on with --data", param="data")
    recipe = finetuning(args.method, args.tower, tower_ratio=args.tower_ratio, lr=args.lr)
    batch = recipe.batch
    if args.row_positions:
        recipe = replace(recipe, prepare=replace(recipe.prepare, max_positions=args.row_positions))
        batch = replace(batch, row_positions=args.row_positions)
    recipe = replace(recipe, batch=replace(batch, rows=args.rows or batch.rows))
    _train((_changed(recipe, args),), find_model(args.model), args)


def _changed(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what was typed."""
    from nvila.train.recipes import Duration, Precision

    if args.data is not None:
        recipe = replace(recipe, data=args.data)
    if args.steps or args.epochs or args.seconds:
        length = Duration(steps=args.steps or 0, epochs=args.epochs or 0.0, seconds=args.seconds or 0.0)
        recipe = replace(recipe, duration=length)
    if args.lanes:
        rows = math.ceil(recipe.batch.rows / args.lanes) * args.lanes
        recipe = replace(recipe, batch=replace(recipe.batch, rows=rows, lanes=args.lanes))
    if args.precision:
        recipe = replace(recipe, precision=Precision(args.precision))
    if args.strict:
        recipe = replace(recipe, skips_bad=False)
    return recipe


def _start(args: argparse.Namespace, name: str) -> Path:
    """The checkpoint that was named; for nvila-tiny and toy runs, one with random weights, made on first use."""
    from nvila.train.nvila_tiny import TINY, TOY, learn_merges, make_base

    if args.start:
        from nvila.cli.checkpoint import find_model

        return find_model(args.start)
    if name.startswith("nvila-tiny"):
        return make_base(args.out / "random", TINY)
    if name.startswith("toy"):
        from nvila.train.toy import texts

        return make_base(args.out / "random", TOY, learn_merges(texts(), 300))
    raise InvalidRequest("say which checkpoint to start from with --from", param="from")


def _train(stages: tuple[Recipe, ...], start: Path, args: argparse.Namespace) -> None:
    if args.workers:
        from nvila.train.cluster import train_on_ray

        if args.stop_after is not None or args.in_process:
            raise InvalidRequest("--stop-after and --in-process are not for a Ray cluster: leave them or --workers out")
        place = (start.resolve(), args.out.resolve())
        show.print_json(train_on_ray(stages, *place, args.workers, args.device, reporter=lines))
        return
    from nvila.quantize.checks import find_device
    from nvila.train.distributed import Ranks
    from nvila.train.loop import train_all

    ranks = Ranks.join(find_device(args.device).type)
    with progress(ranks.is_first, as_json=args.json) as report:
        outcome = train_all(
            stages,
            start.resolve(),
            args.out,
            stop_after_s=args.stop_after,
            ranks=ranks,
            has_processes=not args.in_process,
            report=report,
        )
    ranks.leave()
    if ranks.is_first:
        _tell(outcome, as_json=args.json)


def _tell(outcome: Outcome, *, as_json: bool) -> None:
    counted = outcome.progress
    if counted.skipped and not as_json:
        show.console.print(f"{counted.skipped:,} samples were left out; --strict ends the run at the first one")
    if as_json:
        result = {"model": str(outcome.model) if outcome.model else None, "loss": outcome.loss, "step": counted.step}
        print(json.dumps(result | {"samples": counted.samples, "skipped": counted.skipped}))
    elif outcome.model is None:
        show.console.print(f"stopped at step {counted.step}, loss {outcome.loss:.4f}; the same command goes on")
    else:
        print(outcome.model)
        show.console.print(f"[dim]loss {outcome.loss:.4f}; the picture of it is beside the model[/]")


@contextmanager
def progress(is_shown: bool, *, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar per stage with the loss beside it; lines where stderr is no terminal; JSON lines where asked for."""
    if not is_shown:
        yield lambda metrics: None
    elif as_json:
        yield lambda metrics: print(json.dumps(metrics), flush=True)
    elif not sys.stderr.isatty():
        yield lines()
    else:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        said = TextColumn("{task.fields[said]}")
        columns = (TextColumn("{task.description}"), BarColumn(), said, TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=show.console) as bar:
            tasks: dict[str, Any] = {}

            def report(metrics: dict[str, Any]) -> None:
                name = metrics["name"]
                if name not in tasks:
                    tasks[name] = bar.add_task(name, total=1.0, said="")
                bar.update(tasks[name], completed=metrics["done"], said=_line(metrics))

            yield report


def lines() -> Callable[[dict[str, Any]], None]:
    """One line of progress now and then, on stderr."""
    last: dict[str, Any] = {"at": 0.0, "name": ""}

    def report(metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - last["at"] > SAY_EVERY_S or metrics["done"] >= 1 or metrics["name"] != last["name"]:
            print(f"{metrics['name']} {100 * metrics['done']:3.0f} %  {_line(metrics)}", file=sys.stderr, flush=True)
            last.update(at=now, name=metrics["name"])

    return report


def _line(metrics: dict[str, Any]) -> str:
    said = f"step {metrics['step']}  loss {metrics['loss']:.4f}  {metrics['positions_per_s']:,.0f} positions/s"
    return said + (f"  {metrics['memory_gb']:.1f} GB" if "memory_gb" in metrics else "")


# -- pruning, export, tables ------------------------------------------------------------------------------------------


def _prune(args: argparse.Namespace) -> None:
    from nvila.cli.checkpoint import find_model
    from nvila.train.prune import prune

    report = prune(
        find_model(args.large) if args.large else None,
        find_model(args.small),
        args.data,
        args.out,
        keep=args.keep,
        by=args.by,
        limit=args.limit,
    )
    if args.json:
        show.print_json(report.to_json())
    else:
        print(report.to_markdown())


def _export(args: argparse.Namespace) -> None:
    from nvila.train.loop import export_state

    target = export_state(args.run, args.target, dtype=args.dtype, style=args.to, shard_bytes=int(args.shard_mb * 1e6))
    if args.json:
        show.print_json({"model": str(target)})
    else:
        print(target)


def _ablate(args: argparse.Namespace) -> None:
    from nvila.cli.checkpoint import NVILA_TINY, find_model
    from nvila.train.ablations import ablate

    has_own = NVILA_TINY.is_dir() and not args.toy
    table = ablate(
        args.table,
        args.out,
        start=find_model(args.start) if args.start else NVILA_TINY if has_own else None,
        seconds=args.seconds,
        samples=args.samples,
        is_toy=args.toy,
        stop_after_s=args.stop_after,
        lanes=args.lanes,
        report=lines(),
    )
    if table is None:
        show.console.print("stopped; the same command goes on")
    elif args.json:
        show.print_json(table.to_json())
    else:
        print(table.to_markdown())


def _speed(args: argparse.Namespace) -> None:
    from nvila.train.speed import compare

    table = compare(args.size, args.steps)
    if args.json:
        show.print_json(table.to_json())
    else:
        print(table.to_markdown())
