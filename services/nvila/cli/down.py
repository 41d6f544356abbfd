"""`nvila down`: drain a stack, stop it, clean up after it. Nothing to stop is fine."""

from __future__ import annotations

import argparse

from nvila.cli import lifecycle, show
from nvila.cli.state import all_folders, folder_of


def run(args: argparse.Namespace) -> int:
    folders = list(all_folders()) if args.all else [folder_of(args.stack)]
    is_quiet = args.quiet or args.json
    stopped = []
    for folder in folders:
        with show.Progress(is_quiet=is_quiet) as progress:
            if lifecycle.stop(folder, progress.show):
                stopped.append(folder.name)
    if args.json:
        show.print_json({"stopped": stopped})
    elif not is_quiet:
        names = ", ".join(stopped)
        show.console.print(f"stopped: {names}" if stopped else "nothing to stop")
    return 0
