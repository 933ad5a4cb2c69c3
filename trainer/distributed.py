"""Several processes that train as one: accelerate's, where `accelerate launch` started them."""

from datetime import timedelta

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from families.loading import default_device

# The others wait while the main process draws previews and judges the result.
PATIENCE = timedelta(hours=3)


def processes() -> PartialState:
    """Which process this is, and of how many; without a launcher the only one."""
    return PartialState(cpu=default_device().type == "cpu", timeout=PATIENCE)


def same_for_all(value: int) -> int:
    """The main process's value in every process."""
    processes()
    values = [value]
    broadcast_object_list(values)
    return values[0]


def least_of_all(value: int) -> int:
    """The smallest value of all processes."""
    processes()
    return min(gather_object([value]))
