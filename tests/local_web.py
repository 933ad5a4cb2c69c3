"""Hosts of the public web that are really on this machine: NAME.test.example, at any port.

A process that starts a server has one certificate authority. As a script this is `python -m
serving` whose downloads and webhooks find those hosts; it is told the authority's file in
$TEST_AUTHORITY. Everything else, 127.0.0.1 included, is looked up and refused as always.
"""

import atexit
import functools
import os
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PUBLIC = "93.184.215.14"
DOMAIN = ".test.example"


@functools.cache
def authority_file() -> str:
    """The file of the authority that the hosts below have their certificates from."""
    handle, name = tempfile.mkstemp(suffix=".pem")
    os.write(handle, _authority().cert_pem.bytes())  # type: ignore[attr-defined]
    os.close(handle)
    atexit.register(os.unlink, name)
    return name


@functools.cache
def _authority() -> object:
    import trustme

    return trustme.CA()


class LocalHost:
    """An https server with this handler, under `url`; `with` starts and stops it."""

    def __init__(self, name: str, handler: type[BaseHTTPRequestHandler]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _authority().issue_cert(f"*{DOMAIN}").configure_cert(context)  # type: ignore[attr-defined]
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.url = f"https://{name}{DOMAIN}:{self._server.server_port}"
        serve = functools.partial(self._server.serve_forever, poll_interval=0.02)
        self._thread = threading.Thread(target=serve, daemon=True)

    def __enter__(self) -> "LocalHost":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def page(answer: Callable[[BaseHTTPRequestHandler], None]) -> type[BaseHTTPRequestHandler]:
    """A handler that answers every GET with the function."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer(self)
            except OSError:
                pass  # the client has gone

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _main() -> None:
    from inference.fetch import addresses, download
    from serving import __main__, server

    def look_up(host: str, port: int, seconds: float) -> list[str]:
        return [PUBLIC] if host.endswith(DOMAIN) else addresses.look_up(host, port, seconds)

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        here = "127.0.0.1" if address[0] == PUBLIC else address[0]
        return socket.create_connection((here, address[1]), timeout)

    trust = ssl.create_default_context(cafile=os.environ.pop("TEST_AUTHORITY"))
    ours = download.Downloader(look_up, connect, trust, pause=0.1)
    server.run = functools.partial(server.run, downloader=ours)  # type: ignore[assignment]
    __main__.main()


if __name__ == "__main__":
    import sys

    sys.path[0] = str(Path.cwd())  # the code that the server is a copy of
    _main()
