"""`python -m nvila.golden FOLDER [--checkpoints FOLDER]`: see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nvila.golden.compare import Outcome, run
from nvila.golden.folder import RecordedFile, recorded_files


def main(arguments: Sequence[str] | None = None) -> int:
    """One line per difference and per file, then `N matched, M missed`.

    Returns 1 if any case was missed or none was found; exits with 2 for wrong arguments.
    """
    parser = argparse.ArgumentParser(prog="python -m nvila.golden", description="Compare with recorded numbers.")
    parser.add_argument("folder", type=Path, help="JSON and safetensors files in the recorded format")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        action="append",
        default=[],
        help="where to find tiny checkpoints that the folder names and does not hold",
    )
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is no folder")
    matched = missed = 0
    for file in recorded_files(options.folder, options.checkpoints):
        outcomes = compare(file)
        failed = sum(bool(outcome.problems) for outcome in outcomes)
        matched, missed = matched + len(outcomes) - failed, missed + failed
    sys.stdout.write(f"{matched} matched, {missed} missed\n")
    return 1 if missed or not matched else 0


def compare(file: RecordedFile) -> list[Outcome]:
    """Run a file's cases and say what came out."""
    outcomes = []
    for cases in (iter(file.cases), file.unread()):
        for case in cases:
            outcomes.append(run(case))
            for problem in outcomes[-1].problems:
                sys.stdout.write(f"{case.name}: {problem}\n")
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    closest = [outcome.closest for outcome in outcomes if outcome.closest]
    worst = max(closest, key=lambda check: check.difference / check.allowed, default=None)
    exact = "exact" if worst is None else f"within {worst.difference:.1e} of {worst.allowed:.0e} allowed"
    sys.stdout.write(f"{file.name}: {len(outcomes) - failed} matched, {failed} missed, {exact}\n")
    sys.stdout.flush()
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
