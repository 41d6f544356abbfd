"""The documentation page, with everything it needs served from here: no address outside is asked (air-gapped clusters).

A browser reaches it with any user name and the API key as its password.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

PATH = "/docs"
_STATIC = f"{PATH}/static"


def add_docs(app: FastAPI) -> None:
    """Adds the page at `/docs`, over the app's own `/openapi.json`."""
    app.mount(_STATIC, StaticFiles(directory=str(files("fastapi_offline") / "static")), name="docs")

    @app.get(PATH, include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=f"{app.title} API",
            swagger_js_url=f"{_STATIC}/swagger-ui-bundle.js",
            swagger_css_url=f"{_STATIC}/swagger-ui.css",
            swagger_favicon_url=f"{_STATIC}/favicon.png",
        )
