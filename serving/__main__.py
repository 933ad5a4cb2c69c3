"""Start a Cog server on this repository, without Docker.

    python -m serving predict    POST /predictions, a prompt in, images out
    python -m serving train      POST /trainings, a dataset in, weights.zip out

Cog's runtime runs the requests, with the same validation and replies as in the Cog image. In front
of it, a server checks requests and restarts the runtime if it has crashed.
"""

import argparse
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving import cog_yaml

EXAMPLES = {
    "predict": ("predictions", '{"input": {"prompt": "a photo of a red fox", "seed": 1}}'),
    "train": ("trainings", '{"input": {"dataset": "https://example.com/imgs.zip"}}'),
}
PACKAGES = ("cog", "coglet", "httpx", "jsonschema", "starlette", "uvicorn")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="zeroprior serve", description="Start a Cog server, without Docker."
    )
    parser.add_argument("mode", choices=sorted(EXAMPLES), help="generate images or train")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: also for other machines")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(words)

    # Check the setup before the runtime starts, whose errors are less clear.
    config = cog_yaml.read()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"not installed for {sys.executable}: {', '.join(missing)}; "
            "run `pip install -r requirements-dev.txt`"
        )
    interpreter_folder = Path(sys.executable).parent
    if not (interpreter_folder / "python").exists():
        sys.exit(
            f"{interpreter_folder} has no `python`, which Cog needs to start its worker; use a "
            "virtual environment"
        )
    listener = _listen(options.host, options.port)

    from serving import schema

    # The runtime resolves the entry points and `.cog` from its working directory.
    with cog_yaml.working_folder() as folder:
        print(f"schema:  {schema.write(folder)}")
        _print_examples(options.mode, options.host, options.port)
        sys.stdout.flush()
        os.chdir(folder)
        status = _run(options.mode, listener, interpreter_folder, config)
        os.chdir(cog_yaml.ROOT)  # the temporary folder is removed
    sys.exit(status)


def _run(
    mode: str, listener: socket.socket, interpreter_folder: Path, config: Mapping[str, str]
) -> int:
    path = f"{interpreter_folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = os.environ | {
        "PATH": path,
        "COG_PREDICT_TYPE_STUB": config["predict"],
        "COG_TRAIN_TYPE_STUB": config["train"],
    }
    environment.setdefault("LOG_FORMAT", "console")
    environment.setdefault("NO_COLOR", "1")
    # On a busy CPU, OpenMP's spinning idle threads slow down the others: up to 5 s for a step of
    # the miniature instead of 0.1 s, on two cores with other work.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from serving.server import run

    return run(mode, listener, environment)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address; exits with an error message if that fails."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        sys.exit(f"cannot listen on {host}:{port} ({error.strerror}); try another --port")


def _print_examples(mode: str, host: str, port: int) -> None:
    """Prints two commands for another terminal."""
    route, body = EXAMPLES[mode]
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    print(f"health:  curl -s {url}/health-check")
    print(
        f"try it:  curl -s {url}/{route} -H 'Content-Type: application/json' "
        f"-d '{body}' -o {mode}.json"
    )
    print(
        f"The reply is saved in {mode}.json, with files as data URLs. Closing the connection "
        "cancels the request.\n"
    )


if __name__ == "__main__":
    main()
