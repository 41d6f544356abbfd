"""The console at `/`: a page for people, made of plain files beside this module, which talks to the same API.

The page itself holds nothing and needs no key; it asks for one and keeps it in the browser's tab. Its policy lets it
load and call nothing but this gateway, and run nothing that is not one of these files.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from nvila.gateway.middleware import CONSOLE_FILES

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def add_console(app: FastAPI) -> None:
    """Adds the page at `/` and its files."""
    folder = files("nvila.gateway") / "console"
    page = (folder / "index.html").read_bytes()
    app.mount(CONSOLE_FILES.rstrip("/"), _Files(directory=str(folder)), name="console")

    @app.get("/", include_in_schema=False)
    async def console() -> Response:
        return Response(page, media_type="text/html", headers=_HEADERS)
