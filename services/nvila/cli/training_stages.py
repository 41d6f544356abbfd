"""What can be typed after `nvila train`, but for its data; the work is in cli/train_stages.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

Add = Callable[..., argparse.ArgumentParser]

_LANES = min(12, os.cpu_count() or 1)
"""Feeding processes of an ablation: as many as keep a GPU busy, where there are so many processors."""


def stages(add: Add) -> None:
    recipes = add("recipes", help="the recipes there are: what trains, rates, batch, length")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="everything about one of them")
    _json(recipes)
    recipe = add("recipe", help="run one stage, or go on with it")
    recipe.add_argument("name", metavar="NAME", help="see `nvila train recipes`")
    _run(recipe)
    every = add("all", help="run all stages of a model one after the other, or go on with them")
    every.add_argument("family", metavar="FAMILY", help="nvila-tiny, toy, nvila or lite")
    every.add_argument("--minutes", type=float, metavar="M", help="of training in all, for nvila-tiny (default: 20)")
    _run(every)
    _finetune(add("finetune", help="tune a model on your own conversations, merge, and export it"))
    _prune(add("prune", help="keep the samples that a large model finds easier than a small one"))
    _export(add("export", help="write a run's newest state as a checkpoint that can be served"))
    _ablate(add("ablate", help="train and compare variants of nvila-tiny, as in one table of the paper"))
    speed = add("speed", help="positions per second, memory and loss in bf16 and FP8, as in Table 4")
    speed.add_argument("--size", choices=["toy", "2b", "8b"], default="2b", help="of a random model (%(default)s)")
    speed.add_argument("--steps", type=int, default=10, metavar="N", help="(%(default)s)")
    _json(speed)


def _finetune(action: argparse.ArgumentParser) -> None:
    action.add_argument("--model", required=True, metavar="FOLDER|ID", help="the checkpoint to tune")
    action.add_argument("--method", choices=["lora", "qlora", "full"], default="lora", help="of the language model")
    action.add_argument(
        "--tower", choices=["norms", "full", "lora", "frozen"], default="norms", help="what of it learns"
    )
    action.add_argument("--tower-ratio", type=float, default=10.0, metavar="X", help="its rate is X times smaller (10)")
    action.add_argument("--lr", type=float, help="of the language model (default: the method's)")
    action.add_argument("--row-positions", type=int, metavar="N", help="longest packed row (default: the recipe's)")
    action.add_argument("--rows", type=int, metavar="N", help="rows per step (default: the recipe's)")
    _run(action, has_start=False)


def _prune(action: argparse.ArgumentParser) -> None:
    action.add_argument("--large", metavar="FOLDER|ID", help="needed for DeltaLoss")
    action.add_argument("--small", required=True, metavar="FOLDER|ID")
    action.add_argument("--data", required=True, metavar="MIXTURE", help="data sets, joined by +")
    action.add_argument(
        "--keep", type=float, default=0.5, metavar="X", help="share kept of every data set (%(default)s)"
    )
    action.add_argument(
        "--by", choices=["delta", "random", "cluster"], default="delta", help="DeltaLoss or a baseline (%(default)s)"
    )
    action.add_argument("--limit", type=int, metavar="N", help="look only at the first N samples of each data set")
    action.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for lists of what to leave out")
    _json(action)


def _export(action: argparse.ArgumentParser) -> None:
    action.add_argument("run", type=Path, metavar="RUN", help="folder of one stage, with run.json in it")
    action.add_argument("target", type=Path, metavar="NEW_FOLDER")
    action.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    action.add_argument("--to", choices=["vila", "hf"], default="vila", help="folders per part, or one flat folder")
    action.add_argument("--shard-mb", type=float, default=5000, metavar="MB", help="largest weight file (%(default)s)")
    _json(action)


def _ablate(action: argparse.ArgumentParser) -> None:
    action.add_argument("table", choices=["1", "2", "3", "5", "10"], help="which table of arXiv:2412.04468")
    action.add_argument("--from", dest="start", metavar="FOLDER", help="any nvila-tiny (default: the one served)")
    action.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    action.add_argument("--seconds", type=float, default=60, metavar="S", help="of training per stage (%(default)s)")
    action.add_argument(
        "--samples", type=int, default=100, metavar="N", help="held-out samples per family (%(default)s)"
    )
    action.add_argument("--toy", action="store_true", help="a few steps on a processor: proves that the command works")
    action.add_argument("--lanes", type=int, default=_LANES, metavar="N", help="feeding processes (%(default)s)")
    action.add_argument("--stop-after", type=float, metavar="S", help="write a state and stop after S seconds")
    _json(action)


def _run(action: argparse.ArgumentParser, *, has_start: bool = True) -> None:
    if has_start:
        action.add_argument("--from", dest="start", metavar="FOLDER|ID", help="checkpoint to start from")
    action.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="runs are kept here, one folder each")
    action.add_argument("--data", metavar="MIXTURE", help="FOLDER::NAME*3+NAME, files, or synthetic:FAMILY+…")
    length = action.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="per stage, instead of what the recipe says")
    length.add_argument("--epochs", type=float, metavar="X", help="likewise")
    length.add_argument("--seconds", type=float, metavar="S", help="likewise")
    action.add_argument("--strict", action="store_true", help="end at the first bad sample, instead of leaving it out")
    action.add_argument("--lanes", type=int, metavar="N", help="streams of data, each fed by a process of its own")
    action.add_argument("--in-process", action="store_true", help="feed from this process, without others")
    action.add_argument("--precision", choices=["float32", "bf16", "fp8"], help="instead of what the recipe says")
    action.add_argument(
        "--stop-after", type=float, metavar="S", help="write a state and stop after S seconds; the same command goes on"
    )
    action.add_argument("--workers", type=int, metavar="N", help="train on a Ray cluster with N workers")
    action.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    _json(action)


def _json(action: argparse.ArgumentParser) -> None:
    action.add_argument("--json", action="store_true", help="print JSON, for programs")
