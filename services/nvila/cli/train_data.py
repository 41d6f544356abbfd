"""`nvila train data`: render the synthetic tasks into shards or files, or check data that is there."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nvila.cli import show
from nvila.errors import InvalidRequest
from nvila.train.data.catalogue import TASKS, make_sample
from nvila.train.data.draw import Knobs, Split
from nvila.train.data.fonts import HELD_OUT, TRAINED
from nvila.train.data.generate import Plan, generate, held_out_layouts
from nvila.train.data.listing import write_listing
from nvila.train.data.mixture import open_mixture
from nvila.train.data.stream import read
from nvila.train.samples import Unusable

_MOST_FAULTS_SHOWN = 20


def run(args: argparse.Namespace) -> int:
    if args.list:
        return _list(as_json=args.json)
    if args.check:
        return _check(args)
    families = tuple(args.tasks.split(",")) if args.tasks else tuple(TASKS)
    counts = {Split.TRAIN: args.train, Split.VALIDATION: args.validation, Split.TEST: args.test}
    knobs = _knobs(args.set)
    plan = Plan(families=families, counts=counts, seed=args.seed, knobs=knobs, shard_samples=args.shard)
    if args.sheet:
        from nvila.train.data.sheet import contact_sheet

        contact_sheet(families, args.seed, knobs).save(args.sheet)
        show.console.print(f"{args.sheet}: examples of {len(families)} families")
        return 0
    began = time.perf_counter()
    with _bar() as bar:
        task = bar.add_task("rendering", total=plan.samples)
        if args.files:
            rendered = _files(plan, args.folder, lambda: bar.advance(task))
        else:
            workers = args.workers or os.cpu_count() or 1
            rendered = generate(plan, args.folder, workers, lambda count: bar.advance(task, count))
    took_s = time.perf_counter() - began
    rate = rendered / took_s
    if args.json:
        show.print_json({"folder": str(args.folder), "samples": plan.samples, "rendered": rendered, "took_s": took_s})
    else:
        show.console.print(
            f"{args.folder}: {plan.samples:,} samples of {len(families)} families, "
            f"{rendered:,} of them rendered now in {took_s:.1f} s ({rate:.0f} a second)"
        )
    return 0


def _files(plan: Plan, folder: Path, advance: Any) -> int:
    """One conversation JSON per family and split."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for split, count in plan.counts.items():
        for family in plan.families:

            def samples(family: str = family, split: Split = split, count: int = count) -> Any:
                for index in range(count):
                    yield make_sample(family, split, plan.seed, index, plan.knobs)
                    advance()

            if count:
                written += write_listing(folder / f"{family}-{split}.json", samples(), media_folder=f"{family}-{split}")
    return written


def _check(args: argparse.Namespace) -> int:
    """Read every sample, decode all media, and name what is broken by file and line. Fails if anything is."""
    mixture = open_mixture(args.check, args.folder)
    faults = list(mixture.faults)
    good = 0
    with _bar() as bar:
        task = bar.add_task("reading", total=sum(len(part.indices) for part in mixture.parts))
        for part in mixture.parts:
            for index in part.indices:
                sample = read(part.source, index)
                if isinstance(sample, Unusable):
                    faults.append(sample)
                else:
                    good += 1
                bar.advance(task)
    if args.json:
        show.print_json({"good": good, "bad": [asdict(fault) for fault in faults]})
    else:
        for fault in faults[:_MOST_FAULTS_SHOWN]:
            print(fault)
        show.console.print(f"{good:,} samples can be used, {len(faults):,} cannot")
    return 3 if faults else 0


def _list(*, as_json: bool) -> int:
    listed = {
        "families": list(TASKS),
        "knobs": asdict(Knobs()),
        "fonts": [face.name for face in TRAINED],
        "held_out_fonts": [face.name for face in HELD_OUT],
        "held_out_layouts": held_out_layouts(),
    }
    if as_json:
        show.print_json(listed)
        return 0
    for name, value in listed.items():
        print(f"{name.replace('_', ' '):17} {value}")
    return 0


def _knobs(settings: Sequence[str]) -> Knobs:
    """KNOB=VALUE, pairs as A..B. Raises `InvalidRequest` for a knob there is none of or a value that is no number."""
    known = {field.name: getattr(Knobs(), field.name) for field in fields(Knobs)}
    chosen: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in known:
            raise InvalidRequest(f"there is no knob {name!r}; there are: {', '.join(known)}")
        kind = type(known[name][0]) if isinstance(known[name], tuple) else type(known[name])
        try:
            values = tuple(kind(part) for part in text.split(".."))
        except ValueError:
            raise InvalidRequest(f"--set {setting}: {text!r} is no {kind.__name__}") from None
        wanted = 2 if isinstance(known[name], tuple) else 1
        if len(values) != wanted:
            raise InvalidRequest(f"--set {setting}: expected {'LOW..HIGH' if wanted == 2 else 'one number'}")
        chosen[name] = values if wanted == 2 else values[0]
    return Knobs(**chosen)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        console=show.console,
        transient=True,
    )


class _Speed(ProgressColumn):
    """Samples a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f}/s" if task.speed else "", style="dim")
