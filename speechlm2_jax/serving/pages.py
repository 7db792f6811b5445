"""The page at `/`: a few files of the package, which load nothing else."""

from collections.abc import Mapping
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES: Mapping[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Path -> file and media type."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(
    files: Mapping[str, tuple[str, str]] = FILES, package: str = "speechlm2_jax.serving"
) -> list[Route]:
    """The routes of a page, whose files are in the folder `page` of a package."""
    return [_route(path, package, *file) for path, file in files.items()]


def _route(path: str, package: str, name: str, kind: str) -> Route:
    content = resources.files(package).joinpath("page", name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return Route(path, page)
