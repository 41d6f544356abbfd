"""From what a user calls a checkpoint to a folder: a path, or `organisation/name[@revision]` on the Hugging Face hub.

Only configuration, tokenizer and safetensors files are fetched: no code, no pickle. A revision that is a whole commit
hash is taken from the local cache without asking anybody, so a pinned model starts without network.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from nvila.errors import InvalidCheckpoint, Unavailable

WANTED_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*", "README.md")
UNWANTED_FILES = ("*.bin", "*.pt", "*.pth", "*.py", "*.onnx", "trainer_state.json", "runs/*")

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_id(named: str) -> bool:
    return _ID.fullmatch(named) is not None


def locate(named: str | Path, cache: Path | None = None, endpoint: str | None = None) -> Path:
    """The folder of a checkpoint. A folder that is there wins over a hub id of the same name.

    `cache`, `endpoint`: other than huggingface_hub's own (HF_HUB_CACHE, HF_ENDPOINT). Raises `InvalidCheckpoint` when
    there is no such folder or repository, `Unavailable` when the hub cannot be asked and the cache has no copy.
    """
    folder = Path(named).expanduser()
    if folder.is_dir():
        return folder.resolve()
    found = _ID.fullmatch(str(named))
    if found is None:
        raise InvalidCheckpoint(f"there is no folder {str(named)!r}, and it is not a hub id such as organisation/name")
    return _fetch(found["repo"], found["revision"], cache, endpoint)


def name_of(folder: Path) -> str:
    """What a checkpoint is called: its folder's name, or of a hub snapshot the repository's id."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def _fetch(repo: str, revision: str | None, cache: Path | None, endpoint: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    fetch = partial(
        snapshot_download,
        repo,
        revision=revision,
        cache_dir=cache,
        allow_patterns=list(WANTED_FILES),
        ignore_patterns=list(UNWANTED_FILES),
    )
    label = f"{repo}@{revision}" if revision else repo
    if revision and _COMMIT.fullmatch(revision):
        try:
            return Path(fetch(local_files_only=True))
        except LocalEntryNotFoundError:
            pass
    try:
        return Path(fetch(endpoint=endpoint))
    except RevisionNotFoundError as error:
        raise InvalidCheckpoint(f"the hub has no revision {revision!r} of {repo!r}") from error
    except RepositoryNotFoundError as error:
        raise InvalidCheckpoint(f"the hub has no model {repo!r}, or it asks for an access token (HF_TOKEN)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Unavailable(
            f"{label!r} is no folder here and not in the local hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); download it where there is a network, or name a folder"
        ) from error
