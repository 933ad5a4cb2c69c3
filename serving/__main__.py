"""Start Cog's HTTP server on this repository, without Docker.

    python -m serving predict    POST /predictions, a prompt in, pictures out
    python -m serving train      POST /trainings, a dataset in, weights.zip out

It is the server that runs inside the image: same runtime, same validation, same replies.
"""

import argparse
import importlib.util
import os
import socket
import sys
from pathlib import Path

from serving import cog_yaml

EXAMPLES = {
    "predict": ("predictions", '{"input": {"prompt": "a photo of a red fox", "seed": 1}}'),
    "train": ("trainings", '{"input": {"dataset": "/path/to/imgs.zip"}}'),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m serving", description="Start Cog's HTTP server, without Docker."
    )
    parser.add_argument("mode", choices=sorted(EXAMPLES), help="what the server does")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args()

    # What can be wrong is found before the runtime starts, which says less about it.
    config = cog_yaml.read()
    version = config["build"]["sdk_version"]
    if importlib.util.find_spec("cog") is None or importlib.util.find_spec("coglet") is None:
        sys.exit(
            f"Cog is not installed for {sys.executable}; "
            f"`pip install cog=={version} coglet=={version}` installs it"
        )
    interpreter_folder = Path(sys.executable).parent
    if not (interpreter_folder / "python").exists():
        sys.exit(
            f"{interpreter_folder} has no `python`, the name under which Cog starts its worker; "
            "use a virtual environment"
        )
    _require_free_port(options.host, options.port)

    from serving import schema

    print(f"schema:  {schema.write()}")
    _print_examples(options.mode, options.host, options.port)

    environment = os.environ | {
        "PATH": f"{interpreter_folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PORT": str(options.port),
        "COG_PREDICT_TYPE_STUB": config["predict"],
        "COG_TRAIN_TYPE_STUB": config["train"],
    }
    environment.setdefault("LOG_FORMAT", "console")
    # Where others use the CPU too, OpenMP's idle threads would spin in the way of the busy ones:
    # up to 5 s for a step of the miniature in place of 0.1 s, on two cores with other work.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    server = [sys.executable, "-m", "cog.server.http", "--host", options.host]
    # The runtime resolves the entry points and `.cog` from its working folder.
    os.chdir(cog_yaml.ROOT)
    sys.stdout.flush()
    os.execve(sys.executable, [*server, "--x-mode", options.mode], environment)


def _require_free_port(host: str, port: int) -> None:
    """Exit with a sentence when nothing can listen at this address."""
    with socket.socket() as probe:
        # A port in TIME_WAIT is free for the runtime, so it must be free for the probe.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            sys.exit(f"cannot listen on {host}:{port} ({error.strerror}); try another --port")


def _print_examples(mode: str, host: str, port: int) -> None:
    """Two lines to paste into another terminal."""
    route, body = EXAMPLES[mode]
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    print(f"is it up:  curl -s {url}/health-check")
    print(
        f"try it:    curl -s {url}/{route} -H 'Content-Type: application/json' "
        f"-d '{body}' -o {mode}.json"
    )
    print(
        f"The reply lands in {mode}.json, with files as data URLs. Breaking off the request "
        "cancels it.\n"
    )


if __name__ == "__main__":
    main()
