"""An upload's multipart body, read as it arrives: the file goes straight to disk, other fields stay small.

Starlette's own form parser would write the whole file to the system's temporary folder first, uncounted and unhashed.
"""

from __future__ import annotations

from collections.abc import AsyncIterable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from nvila.errors import InvalidRequest, LimitExceeded, UnsupportedMedia
from nvila.gateway.scratch import Spool, Spooled

_MOST_PARTS = 16
_LONGEST_FIELD_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A received form: its one `file` part, on disk, and its other fields. `filename` is the client's, unchecked."""

    file: Spooled
    filename: str
    fields: dict[str, str]


async def receive(body: AsyncIterable[bytes], content_type: str, spool: Spool) -> Upload:
    """Read a form with one file named `file` into `spool`. Raises `InvalidRequest` for anything else."""
    media_type, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if media_type != b"multipart/form-data" or not boundary:
        raise UnsupportedMedia("the body must be multipart/form-data with a boundary")
    form = _Form()
    try:
        parser = form.parser(boundary)
        async for data in body:
            parser.write(data)
            await form.pass_on(spool)
    except FormParserError:
        raise InvalidRequest("the multipart body is malformed") from None
    if not form.is_whole:
        raise InvalidRequest("the multipart body ends before its last boundary")
    if form.filename is None:
        raise InvalidRequest("the form has no file in the field `file`", param="file")
    fields = {name: _text(name, value) for name, value in form.fields.items()}
    return Upload(file=await spool.finish(), filename=form.filename, fields=fields)


@dataclass
class _Form:
    """What the parser's callbacks have seen so far. File data waits in `pending` until it is passed on."""

    filename: str | None = None
    fields: dict[str, bytearray] = field(default_factory=dict)
    pending: list[bytes] = field(default_factory=list)
    is_whole: bool = False
    _parts: int = 0
    _header_name: bytes = b""
    _header_value: bytes = b""
    _disposition: bytes = b""
    _target: bytearray | None = None

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field_data,
                "on_header_value": self._header_value_data,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_end": self._end,
            },
        )

    async def pass_on(self, spool: Spool) -> None:
        for data in self.pending:
            await spool.write(data)
        self.pending.clear()

    def _part_begin(self) -> None:
        self._parts += 1
        self._disposition = b""
        if self._parts > _MOST_PARTS:
            raise LimitExceeded.of("form fields", asked=self._parts, limit=_MOST_PARTS)

    def _header_field_data(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_value_data(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            if self.filename is not None:
                raise InvalidRequest("the form has more than one file", param="file")
            self.filename = options.get(b"filename", b"").decode(errors="replace")
            self._target = None
        elif name in self.fields:
            raise InvalidRequest(f"the form has the field {name[:64]!r} more than once", param=name[:64])
        else:
            self._target = self.fields[name] = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._target is None:
            self.pending.append(data[start:end])
            return
        self._target += data[start:end]
        if len(self._target) > _LONGEST_FIELD_BYTES:
            raise LimitExceeded.of("bytes of a form field", asked=len(self._target), limit=_LONGEST_FIELD_BYTES)

    def _end(self) -> None:
        self.is_whole = True


def _text(name: str, value: bytearray) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"the form field {name[:64]!r} is not UTF-8", param=name[:64]) from None
