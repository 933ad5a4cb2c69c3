"""Checks every request before the routes see it, and adds the security headers to every answer.

Plain ASGI: Starlette's BaseHTTPMiddleware does not go with endless answers.

A page on another site can make the browser send requests to this machine. Its requests name
another Host (DNS rebinding), another Origin, or another site in Sec-Fetch-Site, and they cannot
have the header X-Studio without asking first (CORS), which is never allowed here.
"""

import hashlib
import hmac
import re
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from studio.replies import reply

LOCAL = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# Control characters, backslashes, and parts that are . or ..
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]|(?:^|/)\.{1,2}(?:/|$)")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?", re.IGNORECASE)


class Guard:
    """Passes on the requests of the studio's own page, and refuses all others."""

    def __init__(
        self, app: ASGIApp, hosts: Collection[str] = LOCAL, token: str | None = None
    ) -> None:
        """hosts: names that the Host header may have, with any port, since tunnels change it.
        token: needed by every request, in a cookie that `/?token=` sets."""
        self._app, self._hosts, self._token = app, {each.lower() for each in hosts}, token
        # Cookies do not know ports: two studios on one machine need two names.
        mark = hashlib.sha256((token or "").encode()).hexdigest()[:8]
        self._cookie = f"studio-{mark}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":

            async def guarded(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    for name, value in HEADERS.items():
                        headers.setdefault(name, value)  # the report has its own policy
                await send(message)

            answer = self._refusal(scope) or self._login(scope)
            await (answer or self._app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.getlist("host"), headers.getlist("origin")
        match = _HOST.fullmatch(host[0]) if len(host) == 1 else None
        if match is None or match[1].lower() not in self._hosts:
            return _refused(403, "this Host is not allowed; open the address that was printed")
        if origin and origin != [f"{scope.get('scheme', 'http')}://{host[0]}"]:
            return _refused(403, "requests from other sites are not allowed")
        site, changes = headers.get("sec-fetch-site"), scope["method"] not in ("GET", "HEAD")
        path: str = scope["path"]
        if site not in (None, "same-origin", "none") and (changes or path.startswith("/api/")):
            return _refused(403, "requests from other sites are not allowed")
        if changes and (headers.get("x-studio") != "1" or site == "none"):
            return _refused(403, "the header X-Studio: 1 is missing")
        if _UNSAFE.search(path):
            return _refused(400, "this path is not allowed")
        return None

    def _login(self, scope: Scope) -> Response | None:
        """None if the request has the token; the answer that sets its cookie; or a refusal."""
        if self._token is None:
            return None
        try:
            cookies = SimpleCookie(Headers(scope=scope).get("cookie", ""))
        except CookieError:
            cookies = SimpleCookie()
        if self._cookie in cookies and self._is_token(cookies[self._cookie].value):
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
        if scope["path"] == "/" and scope["method"] == "GET" and self._is_token(given[0]):
            answer = RedirectResponse("/", 303, {"Cache-Control": "no-store"})
            answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict")
            return answer
        return _refused(401, "open the address with the token that the server printed")

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (self._token or "").encode())


def _refused(status: int, error: str) -> Response:
    return reply({"error": error}, status)
