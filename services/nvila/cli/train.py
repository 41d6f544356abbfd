"""`nvila train ACTION`: each action is a module of its own."""

from __future__ import annotations

import argparse
import importlib


def run(args: argparse.Namespace) -> int:
    action = importlib.import_module(f"nvila.cli.train_{args.action}")
    return int(action.run(args) or 0)
