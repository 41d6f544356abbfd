"""Bring a checkpoint to a folder and check it, before a program starts: run by init containers of vision and decode.

    prepare_model.py random|hub|objectStore|existingClaim FOLDER [--repo R --revision V] [--sha256 D]
    prepare_model.py digest FOLDER          print what --sha256 is compared with

Pods that share a volume do it once: a lock lets one work, and a mark beside the folder says that it is complete.
`objectStore` was copied by the container before; `existingClaim` is only checked. Only JSON, safetensors and text are
fetched: no pickle, no code.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import sys
from pathlib import Path

WANTED = ["*.json", "*.safetensors", "*.txt"]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", choices=["random", "hub", "objectStore", "existingClaim", "digest"])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--repo", default="")
    arguments.add_argument("--revision", default="main")
    arguments.add_argument("--sha256", default="")
    args = arguments.parse_args()
    if args.source == "digest":
        print(digest(args.folder))
        return 0
    if args.source == "existingClaim":
        check(args.folder, args.sha256)
        return 0
    mark = args.folder.parent / f".{args.folder.name}.complete"
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with (args.folder.parent / f".{args.folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = f"{args.source} {args.repo} {args.revision} {args.sha256}"
        if mark.exists() and mark.read_text() == wanted:
            print(f"{args.folder} is complete")
            return 0
        mark.unlink(missing_ok=True)
        fetch(args)
        check(args.folder, args.sha256)
        mark.write_text(wanted)
    print(f"{args.folder} is ready")
    return 0


def fetch(args: argparse.Namespace) -> None:
    if args.source == "random":
        from nvila.model.tiny import make_random_checkpoint

        make_random_checkpoint(args.folder)  # keeps one that is there
    elif args.source == "hub":
        from huggingface_hub import snapshot_download

        snapshot_download(args.repo, revision=args.revision, local_dir=args.folder, allow_patterns=WANTED)


def check(folder: Path, expected: str) -> None:
    if not (folder / "config.json").is_file() and not (folder / "model" / "config.json").is_file():
        raise SystemExit(f"{folder} is no checkpoint: it has no config.json")
    if expected and (found := digest(folder)) != expected:
        raise SystemExit(f"{folder} has SHA-256 {found}, model.sha256 is {expected}: these are other weights")


def digest(folder: Path) -> str:
    """SHA-256 of the sorted lines `<SHA-256>  <path>` of all files that are not hidden."""
    lines = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {inside.as_posix()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
