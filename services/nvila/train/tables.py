"""A result as a table: Markdown for documents, JSON for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Table:
    """`note`: what was run where, and what was not measured."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def to_markdown(self) -> str:
        head = [f"| {' | '.join(self.columns)} |", f"|{'|'.join(['---', *['---:'] * (len(self.columns) - 1)])}|"]
        body = [f"| {' | '.join(_cell(value) for value in row)} |" for row in self.rows]
        return "\n".join([f"**{self.title}**", "", *head, *body, *(["", self.note] if self.note else [])])

    def to_json(self) -> dict[str, Any]:
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "note": self.note}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
