"""page_router: the built-in page at `/`, and its files."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

from moe_runtime.server.middleware import OPEN_FOLDER

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Everything comes from this server, nothing is inline, and no other site may frame the page.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_router() -> APIRouter:
    """For `make_app(extra_routers=...)`. The page and its files need no key; what it asks for does."""
    router = APIRouter()
    for file in sorted(FOLDER.iterdir()):
        path = "/" if file.name == "index.html" else OPEN_FOLDER + file.name
        router.add_api_route(path, _File(file).answer, methods=["GET", "HEAD"], response_class=Response)
    return router


class _File:
    """Handler of one file, which is read once."""

    def __init__(self, file: Path) -> None:
        self._content = file.read_bytes()
        self._media_type = MEDIA_TYPES[file.suffix]

    async def answer(self) -> Response:
        return Response(self._content, media_type=self._media_type, headers=HEADERS)
