"""The Serve application: `import_path: fleet.app:application` in a file for `serve deploy`."""

from typing import Any

from ray import serve

from fleet import generator
from fleet.front import Front
from fleet.settings import FleetSettings


def application(settings: FleetSettings) -> Any:
    """A front, and replicas of one base model behind it."""
    front = serve.deployment(
        Front,
        name="Front",
        num_replicas=settings.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
    )
    return front.bind(generator.deployment(settings).bind(settings), settings)
