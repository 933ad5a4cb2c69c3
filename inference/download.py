"""Files from the web, for requests that nobody has read: https alone, and public addresses alone.

A server that fetches what strangers name can be sent to its own network. Here every name is
resolved once, every address it has must be public, and the connection goes to one of those very
addresses; after each redirect anew. So neither a redirect nor a second answer of the name server
leads inside.
"""

import http.client
import ipaddress
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from adapters.atomic import FULL

log = logging.getLogger(__name__)

REDIRECTS = 5
ATTEMPTS = 3
SECONDS = 30.0  # without a byte
MAX_SECONDS = 900.0  # for a whole file
MAX_JSON_BYTES = 8 << 20
MAX_BYTES = 8 << 30  # of a file, as in adapters.lora_file, which would import PyTorch here
_BLOCK = 1 << 20
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses in the clothes of public IPv6 ones


class DownloadError(ValueError):
    """A file that cannot, or must not, be fetched."""


class _Passing(Exception):
    """A failure that may be gone at the next attempt."""


@dataclass(frozen=True)
class Downloaded:
    """What a server said about the file it sent."""

    unchanged: bool  # the file is the one whose etag was given; nothing was sent
    etag: str | None


def look_up(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system's resolver knows them."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _Passing(f"{host} has no address ({error})") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether an address lies on the open internet, in whatever clothes."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


@dataclass(frozen=True)
class Downloader:
    """Fetches files. The fields are there for a test, which has a server and a name of its own."""

    addresses: Callable[[str, int], list[str]] = look_up
    connect: Callable[..., socket.socket] = socket.create_connection
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    pause: float = 1.0  # seconds before the second attempt; doubled before each further one
    max_bytes: int = MAX_BYTES

    def file(
        self, url: str, path: Path, token: str | None = None, etag: str | None = None
    ) -> Downloaded:
        """Writes what lies at the URL to `path`.

        `token` is sent to the URL's own host alone, never to where it redirects. With the `etag`
        of a copy the file is sent only if it differs. Raises `DownloadError` with the reason.
        """

        def write(response: http.client.HTTPResponse) -> None:
            with path.open("wb") as file:
                for block in _body(response, self.max_bytes):
                    file.write(block)

        return self._attempts(url, token, etag, write)

    def json(self, url: str, token: str | None = None) -> Any:
        """The JSON document at the URL. Raises `DownloadError` with the reason."""
        content = bytearray()

        def read(response: http.client.HTTPResponse) -> None:
            content.clear()
            for block in _body(response, MAX_JSON_BYTES):
                content.extend(block)

        self._attempts(url, token, None, read)
        try:
            return json.loads(content)
        except ValueError as error:
            raise DownloadError(f"{shown(url)} did not answer with JSON") from error

    def check(self, url: str) -> None:
        """Raises `DownloadError` for a URL that would not be followed; looks its host up."""
        parts = _checked(url)
        try:
            self._public(parts)
        except _Passing as error:
            raise DownloadError(f"{shown(url)}: {error}") from error

    def post(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        """Sends `body` once and returns the status of the answer; a redirect is not followed.

        Raises `DownloadError` for a URL that must not be followed, else OSError or HTTPException.
        """
        parts = _checked(url)
        try:
            connection = self._connection(parts)
        except _Passing as error:
            raise OSError(str(error)) from error
        with closing(connection):
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", target, body, {"User-Agent": "zeroprior"} | headers)
            return connection.getresponse().status

    def _attempts(
        self,
        url: str,
        token: str | None,
        etag: str | None,
        take: Callable[[http.client.HTTPResponse], None],
    ) -> Downloaded:
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise DownloadError("the token holds characters that no token does; copy it again")
        for attempt in range(ATTEMPTS):
            try:
                with self._response(url, token, etag) as response:
                    if response.status != 304:
                        take(response)
                    return Downloaded(response.status == 304, response.getheader("ETag"))
            except (_Passing, OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise  # the disk's fault, not the line's
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise DownloadError(f"{shown(url)}: {error.verify_message}") from error
                reason = str(error) or type(error).__name__
                if attempt + 1 == ATTEMPTS:
                    raise DownloadError(
                        f"{shown(url)} could not be fetched in {ATTEMPTS} attempts: {reason}"
                    ) from error
                log.warning("%s: %s; trying again", shown(url), reason)
                time.sleep(self.pause * 2**attempt)
        raise AssertionError

    @contextmanager
    def _response(
        self, url: str, token: str | None, etag: str | None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer that comes after all redirects."""
        asked = urlsplit(url)
        for _ in range(REDIRECTS + 1):
            parts = _checked(url)
            headers = {"User-Agent": "zeroprior", "Accept-Encoding": "identity"}
            if token and parts.netloc == asked.netloc:
                headers["Authorization"] = f"Bearer {token}"
            if etag:
                headers["If-None-Match"] = etag
            with closing(self._connection(parts)) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status in (301, 302, 303, 307, 308) and location:
                    url = urljoin(url, location)
                    continue
                _check_status(response, url, token, etag)
                yield response
                return
        raise DownloadError(f"{shown(url)} redirects more than {REDIRECTS} times")

    def _public(self, parts: SplitResult) -> list[str]:
        """The addresses of a URL's host. Raises `DownloadError` if one of them is not public."""
        host, port = parts.hostname or "", parts.port or 443
        found = self.addresses(host, port)
        inside = [address for address in found if not is_public(address)]
        if inside or not found:
            raise DownloadError(
                f"{host} is not on the public internet; files are fetched from there alone"
            )
        return found

    def _connection(self, parts: SplitResult) -> http.client.HTTPSConnection:
        host, port = parts.hostname or "", parts.port or 443
        found = self._public(parts)
        connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=self.tls)
        plain = self._socket(found, port)
        try:
            connection.sock = self.tls.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        return connection

    def _socket(self, addresses: list[str], port: int) -> socket.socket:
        for address in addresses[:-1]:
            try:
                return self.connect((address, port), SECONDS)
            except OSError:
                log.debug("no answer from %s", address)
        return self.connect((addresses[-1], port), SECONDS)


def shown(url: str) -> str:
    """A URL as it may stand in a log: without its query, which may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise DownloadError(f"{url!r} is not a URL ({error})") from error
    if parts.scheme != "https":
        raise DownloadError(f"{shown(url)}: files are fetched over https only, not {parts.scheme}")
    if not parts.hostname or parts.username is not None:
        raise DownloadError(f"{shown(url)} has no host, or holds a password; give a plain URL")
    if any(ord(character) <= 32 or ord(character) >= 127 for character in url):
        raise DownloadError(f"{url!r} holds characters that a URL does not; percent-encode them")
    return parts


def _check_status(
    response: http.client.HTTPResponse, url: str, token: str | None, etag: str | None
) -> None:
    status = response.status
    if status == 200 or (status == 304 and etag):
        return
    if status in (401, 403):
        hint = "the token does not open it" if token else "it is private, or wants a token"
        raise DownloadError(f"{shown(url)}: access denied ({status}); {hint}")
    if status == 404:
        raise DownloadError(f"{shown(url)}: nothing there (404); check the spelling")
    if status in (408, 425, 429) or status >= 500:
        raise _Passing(f"the server answered {status}")
    raise DownloadError(f"{shown(url)}: the server answered {status} {response.reason}")


def _body(response: http.client.HTTPResponse, most: int) -> Iterator[bytes]:
    """The content in blocks, no longer than `most` bytes and as long as was announced."""
    announced = response.length
    if announced is not None and announced > most:
        raise DownloadError(f"the file has {announced:,} bytes; {most:,} is the most")
    got, deadline = 0, time.monotonic() + MAX_SECONDS
    while block := response.read(_BLOCK):
        got += len(block)
        if got > most:
            raise DownloadError(f"the file has more than {most:,} bytes, which is the most")
        if time.monotonic() > deadline:
            raise DownloadError(f"the file did not come within {MAX_SECONDS:g} seconds")
        yield block
    if announced is not None and got < announced:
        raise _Passing(f"{got:,} of {announced:,} bytes came")
