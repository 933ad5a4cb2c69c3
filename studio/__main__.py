"""zeroprior studio: a web page to prepare images, train, watch and generate."""

import argparse
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studio.folder import Studio

PORT = 8500
TRIED = 20  # ports from PORT on, if none was given


def arguments_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="zeroprior studio",
        description="Open a web page to prepare images, train, watch and generate.",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="for datasets, outputs, weights"
    )
    parser.add_argument(
        "--datasets",
        type=Path,
        help="a folder with more datasets, beside those of the studio",
    )
    parser.add_argument("--port", type=int, help=f"default: {PORT}, or the next one that is free")
    parser.add_argument("--host", default="127.0.0.1", help="another one needs --allow-host")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name in the browser's address, for other machines; needs the printed token",
    )
    parser.add_argument("--token", action="store_true", help="need a token, on shared machines")
    parser.add_argument("--resume", action="store_true", help="resume runs that were interrupted")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Serves the page until Ctrl-C."""
    options = arguments_parser().parse_args(words)
    local = options.host in ("127.0.0.1", "localhost", "::1")
    if not local and not options.allow_host:
        sys.exit(
            f"--host {options.host} opens the page to other machines; also give --allow-host NAME, "
            "the name of this machine in their address bar"
        )
    from studio.folder import InUse, Studio, locked, say_where

    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    datasets = options.datasets.resolve() if options.datasets is not None else None
    if datasets is not None and not datasets.is_dir():
        sys.exit(f"--datasets: {datasets} is not a folder")
    if datasets is not None and not any(each.is_dir() for each in datasets.iterdir()):
        sys.exit(
            f"--datasets: {datasets} contains no folders; give the folder around your datasets, "
            "which are a folder each"
        )
    studio = Studio(folder, datasets, options.resume)
    token = secrets.token_urlsafe(32) if options.token or options.allow_host else None
    try:
        with locked(folder) as lock:
            listeners = _listen(options.host, options.port)
            name = options.allow_host[0] if not local else "127.0.0.1"
            name = f"[{name}]" if ":" in name.strip("[]") and not name.startswith("[") else name
            address = f"http://{name}:{listeners[0].getsockname()[1]}/"
            say_where(lock, address)
            query = f"?token={token}" if token else ""
            print(f"studio: {address}{query}\nfolder: {folder}\nCtrl-C ends the page, not the runs")
            sys.stdout.flush()
            _serve(studio, listeners, options.allow_host, token)
    except InUse as error:
        sys.exit(str(error))
    _print_runs(studio)


def _serve(
    studio: "Studio",  # type: ignore[name-defined]  # noqa: F821
    listeners: list[socket.socket],
    hosts: Sequence[str],
    token: str | None,
) -> None:
    import uvicorn

    from inference.console import log_to_console
    from studio.app import application
    from studio.guard import LOCAL

    log_to_console()
    config = uvicorn.Config(
        application(studio, (*LOCAL, *hosts), token),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=2,  # a stream of events never ends by itself
    )
    try:
        server = uvicorn.Server(config)
        end = server.handle_exit

        def handle_exit(number: int, frame: FrameType | None) -> None:
            studio.ending.set()  # an open stream would be cancelled, with a traceback
            end(number, frame)

        server.handle_exit = handle_exit  # type: ignore[method-assign, assignment]
        server.run(listeners)
    except KeyboardInterrupt:
        pass


def _listen(host: str, port: int | None) -> list[socket.socket]:
    """Sockets at the address; at the first free port if none is given. Exits on an error."""
    last = ""
    for each in range(PORT, PORT + TRIED) if port is None else [port]:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            found = [socket.create_server((host, each), family=family, backlog=128)]
        except (OSError, OverflowError) as error:
            last = getattr(error, "strerror", None) or str(error)
            continue
        if host in ("127.0.0.1", "localhost") and socket.has_ipv6:
            try:  # browsers may look up localhost as ::1
                number = found[0].getsockname()[1]
                found.append(socket.create_server(("::1", number), family=socket.AF_INET6))
            except OSError:
                pass  # without IPv6
        return found
    sys.exit(f"cannot listen on {host}:{port or PORT} ({last}); try another --port")


def _print_runs(studio: "Studio") -> None:
    """Says which runs go on without the page, and which ones wait for it."""
    from studio.jobs import jobs_of
    from trainer.lock import Lock

    for name in jobs_of(studio).runs.lent:
        print(f"{name} was paused for images; the next start of this studio resumes it")
    outputs = studio.outputs
    for folder in sorted(outputs.iterdir()) if outputs.is_dir() else ():
        if folder.is_dir() and not folder.is_symlink() and Lock.is_held(folder):
            print(f"{folder.name} goes on; zeroprior stop {folder} stops it")


if __name__ == "__main__":
    main()
