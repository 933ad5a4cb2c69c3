"""Limits the compute of one request to a server, as products of settings.

The ranges of single settings are in `trainer.settings.inputs` and apply everywhere. These limits
apply only to requests to a server.
"""

from inference.request import Request, work
from trainer.settings.fields import Settings
from trainer.settings.preservation import BEGINS, extent_of, row_size

# Limits of one request, in images of the base's default resolution. Trained: samples of all steps;
# 20,000 steps of 8 are 160,000, 14 hours of Z-Image on an H100. Previewed: passes through the
# transformer. Encoded: by the VAE, before the first step.
MOST_TRAINED = 200_000
MOST_PREVIEWED = 50_000
MOST_ENCODED = 20_000
MOST_MEASURED = 10_000  # validation losses of a run; each is 16 passes
MOST_CHECKPOINTS = 1_000  # a checkpoint of a large LoRA has 30 GB, which takes half a minute
# Prompts, at most, and one for each of several subjects: see `trainer.monitor.default_previews`.
DEFAULT_PREVIEWS = 2


def too_much(settings: Settings) -> list[str]:
    """One line for each product of settings that is above the limit of one request."""
    found, base = [], settings.base
    steps = settings.steps or base.training_steps.most
    pixels = max(settings.resolutions) ** 2 + base.needs_references * base.default_resolution**2
    relative = pixels / base.training_resolution**2
    each_step = settings.batch_size * settings.gradient_accumulation
    relative *= _preservation(settings)
    if steps * each_step * relative > MOST_TRAINED:
        found.append(
            f"{steps:,} steps of batch_size {settings.batch_size} with gradient_accumulation "
            f"{settings.gradient_accumulation} train on {steps * each_step:,} images, which is too "
            f"much for one request: at most {int(MOST_TRAINED / relative):,} are accepted at "
            f"resolution {max(settings.resolutions)} on {base.name}"
        )
    every = settings.sample_every
    passes = _preview_passes(settings)
    images = len(passes) * (2 + steps // every if every else 1)
    mean = sum(passes) / max(len(passes), 1)
    if images * mean > MOST_PREVIEWED:
        found.append(
            f"{len(passes):,} sample_prompts every {every or steps:,} of "
            f"{steps:,} steps are {images:,} images, which is too much for one request: at most "
            f"{int(MOST_PREVIEWED / mean):,} of their size and steps are accepted on {base.name}; "
            "raise sample_every"
        )
    for name, most in (("validation_every", MOST_MEASURED), ("checkpoint_every", MOST_CHECKPOINTS)):
        every = getattr(settings, name) or steps
        if steps // every > most:
            found.append(
                f"{name} {every:,} is {steps // every:,} times in {steps:,} steps, which is too "
                f"much for one request: at most {most:,} times are accepted; raise {name}"
            )
    return found


def _preservation(settings: Settings) -> float:
    """The mean cost of a step with the rows of preservation, relative to one without.

    Images are not counted: of a run that is near the limit they are at most a hundredth.
    """
    if not settings.preserve:
        return 1.0
    extent = extent_of(settings)
    rows = extent.rows * row_size(settings) / (settings.batch_size * extent.every)
    return 1 + (1 - BEGINS) * rows


def _preview_passes(settings: Settings) -> list[float]:
    """The cost of one preview image of each sample prompt, with its options."""
    base, shared = settings.base, settings.sample_options
    own = settings.sample_overrides or ({},) * len(settings.sample_prompts)
    if settings.sample_defaults and not own:  # default prompts are chosen later
        own = ({},) * (DEFAULT_PREVIEWS + len(settings.subjects))
    requests = [Request(prompt="-", **(shared | each)) for each in own]
    passes = [work(each, base) for each in requests]
    # A reference image costs about as much as the image.
    return [2 * each for each in passes] if base.needs_references else passes


def too_many(settings: Settings, images: int) -> str | None:
    """Why a dataset of `images` images is too large for one request to a server, or None."""
    each = sum(edge**2 for edge in settings.resolutions) / settings.base.training_resolution**2
    each *= 1 + settings.horizontal_flip
    if images * each <= MOST_ENCODED:
        return None
    edges = ", ".join(map(str, settings.resolutions))
    return (
        f"dataset has {images:,} images, which is too much for one request at resolution {edges}: "
        f"at most {int(MOST_ENCODED / each):,} are accepted on {settings.base.name}"
    )
