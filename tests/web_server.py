"""An https server on this machine that stands for every public host."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import trustme

from inference.fetch.download import Downloader

PUBLIC = "93.184.215.14"  # what the names below lead to; the connection ends at our server
NAMES = ("weights.example", "cdn.example", "huggingface.co")
Reply = tuple[int, dict[str, str], bytes]


class Web:
    """An https server that is every public host, and remembers what it was asked."""

    def __init__(self) -> None:
        self.pages: dict[str, Reply | Callable[[dict[str, str]], Reply]] = {}  # by host and path
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.names = dict.fromkeys(NAMES, [PUBLIC])
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                place = headers["host"] + self.path
                web.asked.append((place, headers))
                page = web.pages.get(place.split("?")[0], (404, {}, b"no such page"))
                status, more, body = page(headers) if callable(page) else page
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | more).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*NAMES).configure_cert(context)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)

    def connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        assert address[0] == PUBLIC, f"a connection to {address}"
        return socket.create_connection(self.server.server_address[:2], timeout)

    def downloader(self, most: int = 1 << 20) -> Downloader:
        lookup = lambda host, port, seconds: self.names.get(host, [])  # noqa: E731
        return Downloader(lookup, self.connect, self.trust, pause=0, max_bytes=most)


@contextmanager
def served() -> Iterator[Web]:
    """The server, while it answers."""
    web = Web()
    thread = threading.Thread(target=web.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web
    web.server.shutdown()
    web.server.server_close()
    thread.join()
