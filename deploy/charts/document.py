"""Makes charts/nvila/values.schema.json and README.md from values.yaml, which is the manual: `python deploy/charts/document.py`.

A comment `# -- …` above a key says what it does and makes it a leaf: what is below it is its default. Keys without one
are sections, and closed. `# @schema {…}` adds JSON to the leaf's schema, whose type comes from its default.
`# @settings module:Class name…` makes it a map of that program's settings but for those names, which the chart sets.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "charts" / "nvila"
HEAD = Path(__file__).with_name("README.head.md")

_KEY = re.compile(r"( *)([A-Za-z0-9_]+):")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_UNSAID = ("title", "default", "format", "description", "writeOnly")


@dataclass
class Key:
    """A key of values.yaml. `doc` is empty for a section."""

    path: tuple[str, ...]
    default: Any
    doc: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    settings: str = ""


def keys(text: str) -> Iterator[Key]:
    """All sections and leaves, in order."""
    values = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    comments: list[str] = []
    leaf_indent: int | None = None
    for line in text.splitlines():
        if line.strip().startswith("#"):
            comments.append(line.strip().removeprefix("#").strip())
            continue
        found = _KEY.match(line)
        if found is None:
            if not line.strip():
                comments = []
            continue
        indent, name = len(found[1]), found[2]
        if leaf_indent is not None and indent > leaf_indent:
            comments = []
            continue
        path = [(depth, key) for depth, key in path if depth < indent] + [(indent, name)]
        names = tuple(key for _, key in path)
        key = _with_comments(Key(names, _at(values, names)), comments)
        comments = []
        leaf_indent = indent if key.doc else None
        yield key


def _with_comments(key: Key, comments: list[str]) -> Key:
    doc: list[str] = []
    for line in comments:
        if line.startswith("-- "):
            doc = [line.removeprefix("-- ")]
        elif line.startswith("@schema "):
            key.extra = json.loads(line.removeprefix("@schema "))
        elif line.startswith("@settings "):
            key.settings = line.removeprefix("@settings ")
        elif doc:
            doc.append(line)
    key.doc = " ".join(doc)
    return key


def _at(values: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        values = values[name]
    return values


def schema(text: str) -> dict[str, Any]:
    """The schema of values.yaml, closed at every section."""
    root = _closed()
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Values of the chart nvila", **root}
    root["properties"]["global"] = {"type": "object", "description": "What a parent chart sets for all; not used here."}
    for key in keys(text):
        into = root
        for name in key.path[:-1]:
            into = into["properties"][name]
        into["properties"][key.path[-1]] = _leaf(key) if key.doc else _closed()
    return root


def _closed() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _leaf(key: Key) -> dict[str, Any]:
    made: dict[str, Any] = {"description": key.doc}
    if "enum" not in key.extra:
        made["type"] = _TYPES[type(key.default)]
    if key.settings:
        made |= {"additionalProperties": False, "properties": settings_schema(key.settings)}
    return made | key.extra


def settings_schema(directive: str) -> dict[str, Any]:
    """Of a program's settings class, the fields that the chart leaves to the operator, with their limits."""
    where, *owned = directive.split()
    module, name = where.split(":")
    fields = getattr(importlib.import_module(module), name).model_json_schema()["properties"]
    if unknown := set(owned) - set(fields):
        raise SystemExit(f"values.yaml: {where} has no field {', '.join(sorted(unknown))}")
    return {
        field: {word: value for word, value in made.items() if word not in _UNSAID}
        for field, made in fields.items()
        if field not in owned
    }


def readme(text: str) -> str:
    """The head, and a table of every key for each top-level key."""
    parts = [HEAD.read_text().rstrip(), "\n\n## Values\n"]
    section = None
    for key in keys(text):
        if not key.doc:
            continue
        title = key.path[0] if len(key.path) > 1 else ""
        if title != section:
            parts.append(f"\n### `{title}`\n\n" if title else "\n### for all parts\n\n" if section is None else "\n")
            parts.append("| key | default | meaning |\n|---|---|---|\n")
            section = title
        default = json.dumps(key.default).replace("|", "\\|")
        choices = key.extra.get("enum")
        said = f" One of {', '.join(f'`{choice}`' for choice in choices if choice)}." if choices else ""
        meaning = (key.doc + said).replace("|", "\\|")
        parts.append(f"| `{'.'.join(key.path)}` | `{default}` | {meaning} |\n")
    return "".join(parts)


def main() -> None:
    text = (CHART / "values.yaml").read_text()
    (CHART / "values.schema.json").write_text(json.dumps(schema(text), indent=1, ensure_ascii=False) + "\n")
    (CHART / "README.md").write_text(readme(text))


if __name__ == "__main__":
    main()
