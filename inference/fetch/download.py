"""Files from the web, for requests from untrusted users: https only, public addresses only.

A server that downloads from any address could be made to access its own network. Here every host
name is resolved once, all its addresses must be public, and the connection goes to one of exactly
these addresses; this is repeated for each redirect. So neither a redirect nor a second answer of
the name server can lead to an internal address.
"""

import http.client
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from adapters.files.atomic import FULL
from adapters.files.bounded_json import loads
from adapters.files.containers import printable
from families.redact import bare_address
from inference.fetch.addresses import is_public, look_up
from inference.fetch.connection import Deadline, DeadlinePassed, Wire, connect_to

log = logging.getLogger(__name__)

REDIRECTS = 5
ATTEMPTS = 3
MAX_SECONDS = 900.0  # for a whole file: names, connections, redirects and attempts included
MAX_JSON_SECONDS = 60.0
MAX_JSON_BYTES = 8 << 20
MAX_JSON_VALUES = 400_000
MAX_URL_LENGTH = 8000  # characters; with the token, less than one write to a socket takes
MAX_TOKEN_LENGTH = 1000
MAX_ETAG_LENGTH = 200
MAX_BYTES = 8 << 30  # of a file, as in adapters.formats.lora_file, which would import PyTorch here
MAX_POST_SECONDS = 30.0
_BLOCK = 1 << 16


class DownloadError(ValueError):
    """A file that cannot or must not be downloaded."""


class _Temporary(Exception):
    """A temporary failure; another attempt may succeed."""


@dataclass(frozen=True)
class Downloaded:
    """The server's response about a file."""

    unchanged: bool  # the file still has the given ETag; nothing was sent
    etag: str | None


@dataclass(frozen=True)
class Downloader:
    """Downloads files. The fields are for tests, which use their own server and host name."""

    addresses: Callable[[str, int, float], list[str]] = look_up
    connect: Callable[[tuple[str, int], float], socket.socket] = connect_to
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    pause: float = 1.0  # seconds before the second attempt; doubled before each further one
    max_bytes: int = MAX_BYTES

    def file(
        self,
        url: str,
        path: Path,
        token: str | None = None,
        etag: str | None = None,
        most: int | None = None,
    ) -> Downloaded:
        """Writes the file at the URL to `path`.

        `token` is sent only to the URL's own host, never to where it redirects. With the `etag` of
        a copy, the file is sent only if it differs. The file may have `most` bytes, `max_bytes` by
        default. Raises `DownloadError` with the reason.
        """

        def write(response: http.client.HTTPResponse) -> None:
            with path.open("wb") as file:
                for block in _body(response, self.max_bytes if most is None else most):
                    file.write(block)

        return self._attempts(url, token, etag, write, MAX_SECONDS)

    def json(self, url: str, token: str | None = None) -> Any:
        """The JSON document at the URL. Raises `DownloadError` with the reason."""
        content = bytearray()

        def read(response: http.client.HTTPResponse) -> None:
            content.clear()
            for block in _body(response, MAX_JSON_BYTES):
                content.extend(block)

        self._attempts(url, token, None, read, MAX_JSON_SECONDS)
        try:
            return loads(bytes(content), MAX_JSON_VALUES)
        except ValueError as error:
            raise DownloadError(f"{shown(url)} did not answer with JSON") from error

    def check(self, url: str) -> None:
        """Raises `DownloadError` for a URL that is not allowed; resolves its host."""
        parts = checked_url(url)
        try:
            self._public(parts, Deadline(MAX_POST_SECONDS))
        except (OSError, DeadlinePassed) as error:
            reason = printable(str(error)[:200]) or "no name server answers"
            raise DownloadError(f"{shown(url)}: {reason}") from error

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        """Sends `body` once and returns the status of the answer; a redirect is not followed.

        Raises `DownloadError` for a URL that is not allowed, else OSError or HTTPException.
        """
        parts, deadline = checked_url(url), Deadline(MAX_POST_SECONDS)
        try:
            with self._connection(parts, deadline) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("POST", target, body, {"User-Agent": "zeroprior"} | headers)
                return connection.getresponse().status
        except DeadlinePassed:
            raise TimeoutError(f"no answer within {MAX_POST_SECONDS:g} seconds") from None

    def _attempts(
        self,
        url: str,
        token: str | None,
        etag: str | None,
        take: Callable[[http.client.HTTPResponse], None],
        seconds: float,
    ) -> Downloaded:
        if token and not _is_plain(token, MAX_TOKEN_LENGTH):
            raise DownloadError("the token contains characters that no token has; copy it again")
        deadline = Deadline(seconds)
        try:
            for attempt in range(ATTEMPTS):
                try:
                    with self._response(url, token, etag, deadline) as response:
                        if response.status != 304:
                            take(response)
                        found = response.getheader("ETag")
                        usable = found if found and _is_plain(found, MAX_ETAG_LENGTH) else None
                        return Downloaded(response.status == 304, usable)
                except (_Temporary, OSError, http.client.HTTPException) as error:
                    if isinstance(error, OSError) and error.errno in FULL:
                        raise  # an error of the disk, not of the network
                    if isinstance(error, ssl.SSLCertVerificationError):
                        raise DownloadError(f"{shown(url)}: {error.verify_message}") from error
                    reason = printable((str(error) or type(error).__name__)[:200])
                    if attempt + 1 == ATTEMPTS:
                        raise DownloadError(
                            f"{shown(url)} could not be fetched in {ATTEMPTS} attempts: {reason}"
                        ) from error
                    log.warning("%s: %s; trying again", shown(url), reason)
                    time.sleep(min(self.pause * 2**attempt, deadline.left()))
        except DeadlinePassed as error:
            raise DownloadError(
                f"{shown(url)} was not complete within {seconds:g} seconds, which is the limit"
            ) from error
        raise AssertionError

    @contextmanager
    def _response(
        self, url: str, token: str | None, etag: str | None, deadline: Deadline
    ) -> Iterator[http.client.HTTPResponse]:
        """The response after all redirects."""
        asked = urlsplit(url)
        for _ in range(REDIRECTS + 1):
            parts = checked_url(url)
            headers = {"User-Agent": "zeroprior", "Accept-Encoding": "identity"}
            if token and parts.netloc == asked.netloc:
                headers["Authorization"] = f"Bearer {token}"
            if etag:
                headers["If-None-Match"] = etag
            with self._connection(parts, deadline) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = _joined(url, location)
                    continue
                _check_status(response, url, token, etag)
                yield response
                return
        raise DownloadError(f"{shown(url)} redirects more than {REDIRECTS} times")

    def _public(self, parts: SplitResult, deadline: Deadline) -> list[str]:
        """The addresses of a URL's host. Raises `DownloadError` if one of them is not public."""
        host, port = parts.hostname or "", parts.port or 443
        found = self.addresses(host, port, deadline.step())
        if not found or not all(map(is_public, found)):
            raise DownloadError(
                f"{printable(host[:200])} is not a public address; files are fetched only from "
                "public addresses"
            )
        return found

    @contextmanager
    def _connection(
        self, parts: SplitResult, deadline: Deadline
    ) -> Iterator[http.client.HTTPConnection]:
        host, port = parts.hostname or "", parts.port or 443
        found = self._public(parts, deadline)
        wire = Wire(self._socket(found, port, deadline), self.tls, host, deadline)
        try:
            connection = http.client.HTTPSConnection(host, port, context=self.tls)
            connection.sock = wire  # type: ignore[assignment]
            yield connection
        finally:
            wire.hang_up()

    def _socket(self, addresses: list[str], port: int, deadline: Deadline) -> socket.socket:
        for address in addresses[:-1]:
            try:
                return self.connect((address, port), deadline.step())
            except OSError:
                log.debug("no answer from %s", address)
        return self.connect((addresses[-1], port), deadline.step())


def shown(url: str) -> str:
    """A URL for logs and messages: no query, which may be a signature, and no password."""
    address = bare_address(url)
    return printable(address[:200]) + ("…" if len(address) > 200 else "")


def checked_url(url: str) -> SplitResult:
    """The parts of a URL that may be fetched. Raises `DownloadError` for any other."""
    if len(url) > MAX_URL_LENGTH:
        raise DownloadError(
            f"{shown(url)}: the URL has {len(url):,} characters; {MAX_URL_LENGTH:,} is the limit"
        )
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        # urlsplit's message may contain the password or the query.
        raise DownloadError(f"{shown(url)} is not a valid URL; check its spelling") from error
    if parts.scheme != "https":
        scheme = printable(parts.scheme[:20]) or "an address without https://"
        raise DownloadError(f"{shown(url)}: files are fetched over https only, not {scheme}")
    if not parts.hostname or parts.username is not None:
        raise DownloadError(f"{shown(url)} has no host, or has a password; give a plain URL")
    if not _is_plain(url, MAX_URL_LENGTH):
        raise DownloadError(
            f"{shown(url)} contains characters that are not allowed in a URL; percent-encode them"
        )
    return parts


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise DownloadError(f"{shown(url)} redirects to an address that is not a URL") from error


def _is_plain(text: str, longest: int) -> bool:
    """Whether the text is printable ASCII without spaces, and not too long."""
    return len(text) <= longest and all("!" <= character <= "~" for character in text)


def _check_status(
    response: http.client.HTTPResponse, url: str, token: str | None, etag: str | None
) -> None:
    status = response.status
    if status == 200 or (status == 304 and etag):
        return
    if status in (401, 403):
        hint = "the token has no access to it" if token else "it is private or needs a token"
        raise DownloadError(f"{shown(url)}: access denied ({status}); {hint}")
    if status == 404:
        raise DownloadError(f"{shown(url)}: not found (404); check the spelling")
    if status in (408, 425, 429) or status >= 500:
        raise _Temporary(f"the server answered {status}")
    reason = printable(response.reason[:100])
    raise DownloadError(f"{shown(url)}: the server answered {status} {reason}")


def _body(response: http.client.HTTPResponse, most: int) -> Iterator[bytes]:
    """The content in blocks: at most `most` bytes, and as many as Content-Length."""
    announced = response.length
    if announced is not None and announced > most:
        raise DownloadError(f"the file has {announced:,} bytes; {most:,} is the limit")
    got = 0
    while block := response.read(_BLOCK):
        got += len(block)
        if got > most:
            raise DownloadError(f"the file has more than {most:,} bytes, which is the limit")
        yield block
    if announced is not None and got < announced:
        raise _Temporary(f"{got:,} of {announced:,} bytes arrived")
