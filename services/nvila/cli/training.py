"""What can be typed for training, evaluation and quantising; the work is in the modules of the actions' names."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvila.cli.training_stages import stages


def train(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    _data(actions.add_parser("data", help="render training and test data, or check your own"))
    stages(actions.add_parser)


def evaluate(verb: argparse.ArgumentParser) -> None:
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.epilog = (
        "examples:\n"
        "  nvila evaluate DATA --model FOLDER                     rendered test sets, by a checkpoint in this process\n"
        "  nvila evaluate DATA --url http://host:8000 --out A.jsonl\n"
        "  nvila evaluate DATA --baseline statistics              what answers without looking are worth\n"
        "  nvila evaluate DOCVQA_FOLDER --format docvqa --model FOLDER\n"
        "  nvila evaluate --compare A.jsonl B.jsonl --max-loss 1  fails if B is worse by more than 1 point\n"
        "  nvila evaluate DATA --compare FOLDER_A FOLDER_B --token-dtype-b int8 --max-loss 2 --min-agreement 98\n"
        "                                                         two checkpoints, asked now; fails likewise if more\n"
        "                                                         than 2 answers of 100 differ"
    )
    verb.add_argument("data", nargs="?", type=Path, metavar="FOLDER", help="with shards, conversation lists, or files")
    verb.add_argument("--tasks", metavar="MIXTURE", help="such as shapes+scene (default: every set of the split)")
    verb.add_argument("--split", default="test", choices=["train", "validation", "test"], help="(%(default)s)")
    verb.add_argument(
        "--format", choices=["ai2d", "docvqa", "textvqa", "mmmu", "videomme"], help="a published benchmark's files"
    )
    verb.add_argument("--limit", type=int, metavar="N", help="first N samples of each set")
    by = verb.add_mutually_exclusive_group()
    by.add_argument("--model", metavar="FOLDER|ID", help="checkpoint, loaded into this process")
    by.add_argument("--url", help="an endpoint of the OpenAI API, such as http://host:8000")
    by.add_argument("--baseline", choices=["chance", "statistics"], help="answers without looking, from training data")
    verb.add_argument("--pipeline", action="store_true", help="with --model: by the gateway's own path, one at a time")
    verb.add_argument("--text-only", action="store_true", help="the same model with nothing to look at")
    verb.add_argument("--served-name", metavar="NAME", help="model name for --url (default: its first)")
    verb.add_argument("--api-key", metavar="KEY", help="for --url")
    verb.add_argument("--concurrency", type=int, default=4, metavar="N", help="requests at a time (%(default)s)")
    verb.add_argument(
        "--batch", type=int, default=8, metavar="N", help="samples at a time in this process (%(default)s)"
    )
    verb.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    verb.add_argument(
        "--frames", type=int, metavar="N", help="looked at of each video (default: the model's; 32 for --url)"
    )
    verb.add_argument("--max-tokens", type=int, default=32, metavar="N", help="longest answer (%(default)s)")
    verb.add_argument("--time-tokens", type=int, metavar="N", help="of the served model, for --url (default: 100)")
    verb.add_argument("--out", type=Path, metavar="FILE", help="keep answers there, one a line; a second run goes on")
    verb.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two kept runs or two checkpoints")
    verb.add_argument(
        "--token-dtype", choices=["float32", "int8"], default="float32", help="visual tokens as a cache keeps them"
    )
    verb.add_argument(
        "--token-dtype-b", choices=["float32", "int8"], help="likewise of checkpoint B of --compare (default: as A's)"
    )
    verb.add_argument("--max-loss", type=float, metavar="POINTS", help="with --compare: most that B may lose (of 100)")
    verb.add_argument(
        "--min-agreement", type=float, metavar="PERCENT", help="with --compare: fewest answers that must be equal"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def quantize(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    tower = actions.add_parser("tower", help="linears of the vision tower in 8 bits, outliers smoothed (W8A8)")
    llm = actions.add_parser("llm", help="linears of the language model in 4 bits (AWQ, W4A16)")
    for action in (tower, llm):
        action.add_argument("model", metavar="FOLDER|ID", help="the checkpoint")
        action.add_argument("out", type=Path, metavar="NEW_FOLDER")
        action.add_argument(
            "--media", nargs="+", type=Path, default=[], metavar="FILE|FOLDER", help="to calibrate with"
        )
        action.add_argument("--data", metavar="MIXTURE", help="likewise, as `nvila train` names data")
        action.add_argument("--seed", type=int, default=0, metavar="N", help="of rendered data (%(default)s)")
        action.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
        action.add_argument(
            "--min-cosine", type=float, metavar="X", help="fail if a layer stays less similar than this"
        )
        action.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    tower.add_argument("--tiles", type=int, default=64, metavar="N", help="to calibrate with (%(default)s)")
    tower.add_argument("--held-out", type=int, default=16, metavar="N", help="tiles to report on (%(default)s)")
    tower.add_argument(
        "--alpha", type=float, default=0.3, metavar="X", help="outliers moved into weights (%(default)s)"
    )
    llm.add_argument("--sequences", type=int, default=128, metavar="N", help="to calibrate with (%(default)s)")
    llm.add_argument("--positions", type=int, default=512, metavar="N", help="of each (%(default)s)")
    llm.add_argument("--held-out", type=int, default=16, metavar="N", help="sequences to report on (%(default)s)")
    llm.add_argument("--group", type=int, default=128, metavar="N", help="inputs that share a scale (%(default)s)")


def _data(action: argparse.ArgumentParser) -> None:
    action.add_argument("folder", type=Path, metavar="FOLDER", help="for shards and manifest, or of data to check")
    action.add_argument("--tasks", metavar="A,B", help="families (default: all; --list names them)")
    action.add_argument("--train", type=int, default=10_000, metavar="N", help="samples of each family (%(default)s)")
    action.add_argument("--validation", type=int, default=200, metavar="N", help="likewise (%(default)s)")
    action.add_argument("--test", type=int, default=400, metavar="N", help="likewise (%(default)s)")
    action.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    action.add_argument("--workers", type=int, metavar="N", help="processes (default: one a processor)")
    action.add_argument("--shard", type=int, default=1000, metavar="N", help="samples of a shard (%(default)s)")
    action.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="such as canvas_px=672")
    action.add_argument("--files", action="store_true", help="conversation JSON, PNG and H.264 files instead of shards")
    action.add_argument("--check", metavar="MIXTURE", help="render nothing: read every sample of these sets")
    action.add_argument("--sheet", type=Path, metavar="PNG", help="a page of examples of every family")
    action.add_argument("--list", action="store_true", help="name the families, the knobs and what is held out")
    action.add_argument("--json", action="store_true", help="print one JSON object, for programs")
