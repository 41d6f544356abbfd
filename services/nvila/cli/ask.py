"""`nvila ask`: a question about images and videos, the answer as it comes, then what it stands on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from nvila.cli import show
from nvila.cli.client import Ask, GatewayClient, Media, Report, kind_of
from nvila.cli.stack import StackConfig
from nvila.cli.state import folder_of
from nvila.errors import InvalidRequest, NotFound, Unavailable
from nvila.types import MediaKind

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")


def run(args: argparse.Namespace) -> int:
    ask = Ask(
        media=[find_media(named) for named in args.media],
        question=args.question,
        num_frames=args.frames,
        fps=args.fps,
        start_s=args.start,
        end_s=args.end,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        timeout_s=args.timeout,
    )
    if args.in_process:
        from nvila.cli.checkpoint import find_model
        from nvila.cli.local import answer_here  # torch and the model

        answer = answer_here(ask, find_model(args.model))
        print_answer(ask, answer, as_json=args.json, at_once=args.no_stream)
        return 0
    with connect(args) as gateway:
        print_answer(ask, gateway.ask(ask), as_json=args.json, at_once=args.no_stream)
    return 0


def find_media(named: str) -> Media:
    """A file or an address. Raises `NotFound` or `InvalidRequest` when it is neither."""
    parts = urlsplit(named)
    if parts.scheme in ("http", "https"):
        is_image = parts.path.lower().endswith(_IMAGE_ENDINGS)
        return Media(kind=MediaKind.IMAGE if is_image else MediaKind.VIDEO, url=named)
    path = Path(named).expanduser()
    if path.is_dir():
        raise InvalidRequest(f"{named} is a folder; name its files")
    if not path.is_file():
        raise NotFound(f"there is no file {named}")
    return Media(kind=kind_of(path), path=path)


def connect(args: argparse.Namespace) -> GatewayClient:
    """The gateway at --url, or the one of the stack."""
    return GatewayClient(*find_gateway(args))


def find_gateway(args: argparse.Namespace) -> tuple[str, str]:
    """Its address and API key."""
    if args.url:
        return args.url.rstrip("/").removesuffix("/v1"), args.api_key or ""
    folder = folder_of(args.stack)
    state = folder.read()
    if state is None or not state.is_alive:
        raise Unavailable(
            f"no stack {args.stack!r} is running here; start one with `nvila up`, "
            "name another with --url, or use --in-process"
        )
    config = StackConfig.read(folder)
    return config.url, args.api_key or config.api_key


def print_answer(ask: Ask, pieces: Generator[str | Report, None, None], *, as_json: bool, at_once: bool) -> None:
    """Print the text on stdout as it comes and the account on stderr; or all of it as one JSON object."""
    said: list[str] = []
    with closing(pieces):
        with show.waiting(_waiting_for(ask.media)):
            piece = next(pieces)
        while isinstance(piece, str):
            piece = piece if said else piece.lstrip()
            said.append(piece)
            if not as_json and not at_once:
                sys.stdout.write(piece)
                sys.stdout.flush()
            piece = next(pieces)
    text = "".join(said)
    if as_json:
        show.print_json(
            {
                "answer": text,
                "model": piece.model,
                "finish_reason": piece.finish_reason,
                "usage": piece.usage,
                "coverage": piece.coverage,
            }
        )
        return
    print(text if at_once else "", flush=True)
    print_account(piece)


def print_account(report: Report) -> None:
    show.console.print()
    if report.coverage.get("media"):
        show.console.print(show.coverage(report.coverage))
    show.console.print(show.stages(report.coverage.get("stage_ms", {})))


def _waiting_for(media: Sequence[Media]) -> str:
    if not media:
        return "thinking"
    names = [one.path.name if one.path else str(one.url) for one in media]
    return f"looking at {', '.join(names)}"
