"""Where a request goes, and when it is sent again. Does not import Ray."""

import math
from collections.abc import Iterable

TRIES = 3  # replicas that a request may lose; then it is probably the reason of their end
# Ray's errors for a replica that has ended. By name, so that this module needs no Ray.
REPLICA_ENDED = {
    *("RayActorError", "ActorDiedError", "ActorUnavailableError", "ReplicaUnavailableError"),
    *("OwnerDiedError", "NodeDiedError", "WorkerCrashedError"),
}
LONGEST_WAIT = 300  # seconds in Retry-After


def routing_key(contents: Iterable[str]) -> str:
    """The LoRA for which a replica is chosen; empty without one: any replica.

    `contents` are the SHA-256 of the first and of the second LoRA. With two, the first one decides,
    so that all requests for a subject go to the replicas that hold it.
    """
    return next(iter(contents), "")


def replica_ended(error: BaseException) -> bool:
    """Whether an error means that a replica has ended, so that its request goes to another one.

    A request depends on nothing but its inputs, and the front sets a seed, so another replica makes
    the same images.
    """
    return any(kind.__name__ in REPLICA_ENDED for kind in type(error).__mro__)


def retry_after(queued: int, replicas: int, seconds: float) -> int:
    """Seconds until half of the queue is generated, for Retry-After.

    `seconds` is the time of one request at a replica.
    """
    return min(max(1, math.ceil(queued * seconds / replicas / 2)), LONGEST_WAIT)
