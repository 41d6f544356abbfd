"""`nvila evaluate`: ask every question of a data set, score the answers, compare two runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvila.cli import show
from nvila.cli.checkpoint import find_model
from nvila.errors import InvalidRequest, NotFound
from nvila.train.data.media import VideoReading
from nvila.train.data.mixture import Source, open_source
from nvila.train.data.stream import read
from nvila.train.evaluation import compare, report
from nvila.train.evaluation.adapters import BenchmarkSource
from nvila.train.evaluation.baselines import Chance, Statistics
from nvila.train.evaluation.run import Answer, Answerer, TextOnly, evaluate, read_answers
from nvila.train.samples import Sample, Unusable
from nvila.types import TokenDtype

if TYPE_CHECKING:
    from nvila.model.config import NvilaConfig

_SERVED_TIME_TOKENS = 100
_FRAMES_ELSEWHERE = 32
"""Read of a video file where no checkpoint is at hand that says how many."""
_LOSS_EXIT = 1
_BASELINE_SAMPLES = 4000
_PLAIN_WIDTH = 140


def run(args: argparse.Namespace) -> int:
    if args.compare:
        return _compare(args)
    if any(option is not None for option in (args.max_loss, args.min_agreement, args.token_dtype_b)):
        raise InvalidRequest(
            "--max-loss, --min-agreement and --token-dtype-b are of two runs: name them with --compare"
        )
    bad: list[str] = []
    name, answers = _ask(args, bad)
    if args.json:
        extra = {"split": args.split, "frames": _reading(args).frames, "left_out": bad}
        show.print_json(report.as_json(name, answers, extra))
    else:
        print_table(report.table(f"{name} on {args.data} ({args.format or args.split})", answers))
        _tell_left_out(bad)
    return 0


def _ask(args: argparse.Namespace, bad: list[str]) -> tuple[str, list[Answer]]:
    """Every question of the data that were named; who answered, and what. `bad` gets what could not be read."""
    if args.data is None:
        raise InvalidRequest("name a folder with test data, or two kept runs with --compare")
    sources = _sources(args)
    bad += [str(fault) for source in sources for fault in getattr(source, "faults", ())]
    total = sum(min(len(source), args.limit or len(source)) for source in sources)
    with closing(_answerer(args, [source.name for source in sources])) as answerer, _bar() as bar:
        if args.text_only:
            answerer = TextOnly(answerer)
        task, right = bar.add_task("asking", total=total, score=0.0), 0.0

        def progress(answer: object) -> None:
            nonlocal right
            right += getattr(answer, "score", 0.0)
            bar.advance(task)
            bar.update(task, score=100 * right / max(1, bar.tasks[0].completed))

        answers = evaluate(
            _samples(sources, args.limit, bad), answerer, args.out, progress, time_tokens=_time_tokens(args)
        )
    if not answers:
        raise NotFound(f"no sample of {args.data} could be read")
    return answerer.name, answers


def _sources(args: argparse.Namespace) -> list[Source]:
    if args.format:
        return [BenchmarkSource(args.format, args.data, _reading(args))]
    names = args.tasks.split("+") if args.tasks else _names(args.data, args.split)
    reading = _reading(args)
    return [open_source(name, args.data, split=args.split, reading=reading) for name in names]


def _reading(args: argparse.Namespace) -> VideoReading:
    """As many frames as are looked at; for a model in this process, in its size at once."""
    config = _config(args)
    if config is None:
        return VideoReading(frames=args.frames or _FRAMES_ELSEWHERE)
    side_px = None if args.pipeline else config.tile_px
    return VideoReading(frames=args.frames or config.default_frames, side_px=side_px)


def _config(args: argparse.Namespace) -> NvilaConfig | None:
    """Of the checkpoint that is asked; None where another process or none is."""
    if args.baseline or args.url:
        return None
    from nvila.model.checkpoint import Checkpoint

    return Checkpoint.open(find_model(args.model)).config


def _names(folder: Path, split: str) -> list[str]:
    """Sets of a split, in shards or conversation lists."""
    shards = {path.name.rpartition(f"-{split}-")[0] for path in folder.glob(f"*-{split}-*.tar")}
    lists = {path.stem for path in folder.glob(f"*-{split}.json*")}
    if not shards and not lists:
        raise NotFound(f"{folder} has no {split} data: neither NAME-{split}-*.tar nor NAME-{split}.json(l)")
    return sorted(shards | lists)


def _samples(sources: list[Source], limit: int | None, bad: list[str]) -> Iterator[Sample]:
    """In order; what cannot be read is left out and named in `bad`."""
    for source in sources:
        for index in range(min(len(source), limit or len(source))):
            sample = read(source, index)
            if isinstance(sample, Unusable):
                bad.append(str(sample))
            else:
                yield sample


def _answerer(args: argparse.Namespace, names: list[str]) -> Answerer:
    if args.token_dtype != TokenDtype.FLOAT32 and (args.baseline or args.url or args.pipeline):
        raise InvalidRequest(f"--token-dtype {args.token_dtype} is of a checkpoint that is loaded without --pipeline")
    if args.baseline:
        training: list[Sample] = []
        for name in names:
            mixture = open_source(name.removesuffix(f"-{args.split}"), args.data, split="train")
            training += [mixture.load(i) for i in range(min(len(mixture), _BASELINE_SAMPLES))]
        return Chance(training) if args.baseline == "chance" else Statistics(training)
    if args.url:
        from nvila.train.evaluation.endpoint import EndpointAnswerer

        return EndpointAnswerer(
            args.url,
            api_key=args.api_key or "",
            model=args.served_name,
            concurrency=args.concurrency,
            frames=args.frames,
            max_tokens=args.max_tokens,
        )
    path = find_model(args.model)
    if args.pipeline:
        from nvila.cli.evaluate_pipeline import PipelineAnswerer

        return PipelineAnswerer(path, frames=args.frames, max_tokens=args.max_tokens)
    from nvila.quantize.checks import find_device
    from nvila.train.evaluation.model import ModelAnswerer

    return ModelAnswerer.load(
        path,
        device=str(find_device(args.device)),
        frames=args.frames,
        batch=args.batch,
        max_tokens=args.max_tokens,
        token_dtype=TokenDtype(args.token_dtype),
    )


def _time_tokens(args: argparse.Namespace) -> int:
    if args.url:
        return _SERVED_TIME_TOKENS if args.time_tokens is None else int(args.time_tokens)
    config = _config(args)
    return config.time_tokens if config else 0


def _compare(args: argparse.Namespace) -> int:
    if args.token_dtype_b and not args.compare[1].is_dir():
        raise InvalidRequest(f"--token-dtype-b: {args.compare[1]} is no checkpoint")
    bad: list[str] = []
    dtypes = (args.token_dtype, args.token_dtype_b or args.token_dtype)
    a, b = (_answers(args, path, dtype, bad) for path, dtype in zip(args.compare, dtypes, strict=True))
    bad = list(dict.fromkeys(bad))
    differences = compare.compare(a, b)
    if args.json:
        show.print_json({"differences": [asdict(one) | {"loss": one.loss} for one in differences], "left_out": bad})
    else:
        print_table(compare.table(f"A {args.compare[0]} · B {args.compare[1]}", differences))
        _tell_left_out(bad)
    lost, agreed = (round(100 * share, 6) for share in (differences[-1].loss, differences[-1].agreement))
    failures = []
    if args.max_loss is not None and lost > args.max_loss:
        failures.append(f"B loses {lost:.1f} points; at most {args.max_loss:g} are allowed")
    if args.min_agreement is not None and agreed < args.min_agreement:
        failures.append(f"{agreed:.1f} % of the answers are equal; at least {args.min_agreement:g} % are asked for")
    for failure in failures:
        show.console.print(f"[red]{failure}[/]")
    return _LOSS_EXIT if failures else 0


def _answers(args: argparse.Namespace, run_or_model: Path, token_dtype: str, bad: list[str]) -> list[Answer]:
    """Of a kept run; or of a checkpoint, which is asked now. `bad` gets what could not be read."""
    if not run_or_model.exists():
        raise NotFound(f"--compare {run_or_model}: there is no such file or folder")
    if not run_or_model.is_dir():
        return read_answers(run_or_model)
    only_model = {"model": str(run_or_model), "url": None, "baseline": None, "out": None, "token_dtype": token_dtype}
    return _ask(argparse.Namespace(**vars(args) | only_model), bad)[1]


def _tell_left_out(bad: list[str]) -> None:
    for where in bad[:10]:
        show.console.print(f"[yellow]left out: {where}[/]")
    if len(bad) > 10:
        show.console.print(f"[yellow]and {len(bad) - 10:,} more[/]")


def print_table(table: object) -> None:
    """A result: on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    console.print(table)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("score {task.fields[score]:.1f}"),
        TimeRemainingColumn(),
        console=show.console,
        transient=True,
    )
