"""Logs: events with fields, one JSON object per line on stderr (or plain text for people).

Code logs through the standard library: `_log.warning("tokens missing", extra={"fields": {"keys": 3}})`. Messages are
short constant phrases; what varies goes into fields. Trace and span ids are added so that logs and traces join.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, Literal

from opentelemetry import trace


def configure(service: str, *, level: str = "INFO", style: Literal["json", "text"] = "json") -> None:
    """Send all of this process's logs to stderr in one style. Call once, at start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if style == "json" else _TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """`_log.info("ready", extra=fields(port=80))`."""
    return {"fields": values}


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            line |= {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        return f"{super().format(record)} {extra}".rstrip()
