"""`nvila train ACTION`: data have a module of their own, everything else is in one."""

from __future__ import annotations

import argparse
import importlib


def run(args: argparse.Namespace) -> int:
    action = importlib.import_module("nvila.cli.train_data" if args.action == "data" else "nvila.cli.train_stages")
    return int(action.run(args) or 0)
