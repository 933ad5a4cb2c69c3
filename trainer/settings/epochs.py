"""Converts epochs to optimizer steps, for job files of programs that count epochs.

The input `epochs` is a plain dictionary: names of settings with their number of epochs, such as
`steps` and `checkpoint_every`, and these numbers about one epoch:

passes        of each image, at each resolution
batch         images of a batch; a batch contains images of one bucket
accumulation  batches of an optimizer step
drop_last     1: an incomplete batch of a bucket is dropped; 0: it is used
"""

import logging
import math
from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

OF_AN_EPOCH = ("passes", "batch", "accumulation", "drop_last")


def steps_of_epoch(
    epochs: Mapping[str, float], buckets: Sequence[int], processes: int = 1
) -> float:
    """Optimizer steps of one epoch; `buckets` are the numbers of images by bucket.

    Several processes share the batches of an epoch.
    """
    passes, batch, accumulation, drop_last = (epochs[name] for name in OF_AN_EPOCH)
    accumulation *= processes
    whole = math.floor if drop_last else math.ceil
    batches = sum(whole(int(count * passes) / batch) for count in buckets)
    # Where incomplete batches are used, an epoch ends with an incomplete step, too.
    return batches / accumulation if drop_last else math.ceil(batches / accumulation)


def in_steps(
    epochs: Mapping[str, float], buckets: Sequence[int], processes: int = 1
) -> dict[str, int]:
    """The settings in `epochs` in optimizer steps. Raises ValueError if there are none."""
    each = steps_of_epoch(epochs, buckets, processes)
    found = {
        name: max(1, int(count * each + 1e-6)) if count else 0
        for name, count in epochs.items()
        if name not in OF_AN_EPOCH
    }
    if not each:
        raise ValueError(
            f"no bucket has enough images for one batch of {epochs['batch']:g}, so an epoch has no "
            "steps; add images, or set steps"
        )
    log.info(
        "epochs of %g steps (images: %d, buckets: %d): %s",
        *(each, sum(buckets), len(buckets)),
        ", ".join(f"{name} {found[name]} for {epochs[name]:g} epochs" for name in found),
    )
    return found
