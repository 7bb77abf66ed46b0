"""GET /docs: every route with a form to try it, from files on this machine, and what browsers ask beside."""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from service.api.answers import Json

router = APIRouter(include_in_schema=False)

# Nothing on the page comes from elsewhere, and the browser is told to see to it.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tare API</title>
<link rel="icon" href="favicon.ico" type="image/svg+xml">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

_START: Final = """// Without validatorUrl: null Swagger UI sends the document to a validator on the internet.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#page",
  deepLinking: true,
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
"""

# A scale that is not level.
_ICON: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="6" '
    'fill="#1f4e5f"/><path d="M5 13 27 9M16 11v14M10 25h12M2 19h8L6 13zM22 15h8l-4-6z" stroke="#fff" '
    'stroke-width="2" fill="none" stroke-linejoin="round"/></svg>'
)


@router.get("/")
async def root() -> RedirectResponse:
    """Lead to the documentation."""
    return RedirectResponse("docs", status_code=307)


@router.get("/docs")
async def page() -> HTMLResponse:
    """The page; its parts have relative addresses, so that it works behind a path prefix."""
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


@router.get("/docs/start.js")
async def start() -> Response:
    """What starts the page; a file of its own, so that the policy can forbid inline scripts."""
    return Response(_START, media_type="text/javascript")


@router.get("/docs/swagger-ui-bundle.js")
async def script() -> FileResponse:
    """Swagger UI."""
    return FileResponse(_assets() / "swagger-ui-bundle.js", media_type="text/javascript")


@router.get("/docs/swagger-ui.css")
async def style() -> FileResponse:
    """Swagger UI's looks."""
    return FileResponse(_assets() / "swagger-ui.css", media_type="text/css")


@router.get("/favicon.ico")
async def icon() -> Response:
    """The icon that a browser asks for unasked; without it there is an error in its console."""
    return Response(_ICON, media_type="image/svg+xml")


@router.get("/openapi.json")
async def openapi(request: Request) -> Json:
    """The description of the API that tools read."""
    return Json(request.app.openapi())


@functools.cache
def _assets() -> Path:
    """Where the package with Swagger UI's files lies; found without importing it."""
    spec = find_spec("fastapi_offline")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the package fastapi-offline is not installed; it brings the files of /docs")
    return Path(spec.submodule_search_locations[0]) / "static"
