"""Start a fleet on this machine, or on the Ray cluster of $RAY_ADDRESS.

    python -m fleet --base-model z-image-turbo --replicas 4 --gpus 1

Ends with Ctrl-C. On a cluster that runs always, use `serve deploy` (docs/scale.md).
"""

import argparse
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from fleet.settings import FleetSettings

MEMORY = 256 << 20  # bytes of Ray's shared memory on this machine; images pass through it


def arguments_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m fleet", description="Serve predictions from several engines, with Ray."
    )
    for name, field in FleetSettings.model_fields.items():
        kind = type(field.default) if field.default is not None else str
        if name != "jobs":
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=kind,
                default=field.default,
                help=f"{field.description} (default: {field.default})",
            )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: also for other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cpus", type=int, help="CPUs of this machine for replicas; default: all")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    options = vars(arguments_parser().parse_args(words))
    host, port, cpus = (options.pop(name) for name in ("host", "port", "cpus"))
    for name in ("store", "runs"):  # other processes have other working folders
        if options[name] and "://" not in options[name]:
            options[name] = Path(options[name]).resolve().as_uri()
    if importlib.util.find_spec("ray") is None:
        sys.exit(f"ray is not installed for {sys.executable}; run `make fleet`")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On a busy CPU, OpenMP's spinning idle threads slow down the others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_worker_niceness", "0")  # the engines are this machine's main work
    import ray
    from ray import serve

    stop = threading.Event()
    own, folder = {}, tempfile.mkdtemp(prefix="zeroprior-ray-")
    if not os.environ.get("RAY_ADDRESS"):
        own = {
            "num_cpus": cpus,
            "object_store_memory": MEMORY,
            "include_dashboard": True,
            "resources": {"training": 1},
            "_temp_dir": folder,
        }
    context = ray.init(log_to_driver=False, **own)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what matters is printed below
    for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which has handlers of its own
        signal.signal(number, lambda *_: stop.set())
    try:
        from fleet import trainings
        from fleet.app import application

        jobs = f"http://{context.dashboard_url}" if options["runs"] else None
        settings = FleetSettings(**options, jobs=jobs)
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(settings), name="fleet")
        if settings.runs:
            serve.run(trainings.deployment(settings), name="trainings", route_prefix="/trainings")
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        print(f"health:  curl -s {url}/health-check")
        print(
            f"try it:  curl -s {url}/predictions -H 'Content-Type: application/json' "
            """-d '{"input": {"prompt": "a photo of a red fox", "seed": 1}}' -o predict.json"""
        )
        print(
            f"steps:   the same with -N -H 'Accept: text/event-stream'\nboard:   http://{context.dashboard_url}"
        )
        for node in ray.nodes():
            print(f"metrics: http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}")
        print("Ctrl-C ends the fleet", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
