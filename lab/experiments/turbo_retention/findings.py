"""What the study found, in sentences whose numbers come from the table."""

from dataclasses import replace
from textwrap import fill

from lab.experiments.statistics import Estimate
from lab.experiments.turbo_retention.curves import (
    DRIFT,
    FREE_RIGHT,
    LIKENESS,
    SHARE,
    SHARPNESS_2,
    SHARPNESS_8,
    SHARPNESS_30,
    SUBJECT_RIGHT,
)
from lab.experiments.turbo_retention.design import TURBO, WEAKER
from lab.experiments.turbo_retention.results import Curve, Results
from lab.experiments.turbo_retention.study import MERGED

ADAPTER, DIRECT, UNDISTILLED = "adapter", "direct", "undistilled"

WIDTH = 100  # characters of a line in the document

# One paragraph each.
TEXT = (
    "Trained with {seeds}. Differences are on the same prompts, image seeds and training seeds.",
    "**With the adapter, the LoRA learns nothing of the adapter's weight change.** Without it, the "
    "LoRA contains {share_direct_first} of that change after {first} steps and {share_direct} "
    "after {last}: the training itself destroys the distillation. With the adapter it is "
    "{share_adapter} after {last} steps, on the undistilled base {share_undistilled}.",
    "**Without the adapter, few-step images become blurry from the start.** In 2 inference steps, "
    "images of other prompts lose {blur_2_first} of turbo's sharpness after {first} steps of "
    "training, compared with training with the adapter, and {blur_2} after {last}. In 8 steps it "
    "is {blur_8_first} and {blur_8}, in 30 steps with guidance {blur_30_first} and {blur_30}: the "
    "fewer the inference steps, the stronger the blur. Merging the whole adapter costs {merged_2} "
    "in 2 steps and {merged_8} in 8.",
    "**With the adapter, turbo loses no more than the undistilled base.** After {last} steps, "
    "LoRAs trained with the adapter differ from those of the undistilled base by {sharp_ac} in "
    "sharpness (2 steps), by {drift_ac} in drift and by {likeness_ac} in likeness: they learn the "
    "subject about as well and change turbo about as much.",
    "**In 8 steps the miniature shows no visible damage, not even without the adapter.** Likeness "
    "after {last} steps is {likeness_adapter} with it and {likeness_direct} without, on the "
    "undistilled base {likeness_undistilled}. Correct attributes in prompts with the subject "
    "differ by {right_da} points between the first two, in other prompts by {free_da_first} after "
    "{first} steps and {free_da} after {last}. This contradicts what users report of the full-size "
    "model. The likely reason is the dataset: captions determine nearly all of an image, and even "
    "the undistilled miniature generates good images in 8 steps ([why](miniature.md#figures)). The "
    "blur is the part that is visible.",
    "**Other prompts change because of the LoRA itself, whichever base it was trained on.** "
    "It was trained on 16 images of one subject and changes other subjects too: from {free_0} % of "
    "attributes correct to {free_adapter} with the adapter, {free_direct} without and "
    "{free_undistilled} on the undistilled base, after {last} steps. Its drift, {drift_adapter}, "
    "is several times the adapter's own, {drift_merged}. In the images below, triangles get the "
    "robot's antenna.",
    "**A long training at scale {scale} beats a short one at scale 1.** The LoRA of {last} steps, "
    "with the adapter, at scale {scale} has a likeness of {likeness_weak} and {free_weak} % of "
    "attributes correct in other prompts; after {half} steps at scale 1 it is {likeness_half} and "
    "{free_half} %.",
)
DEFAULT_TEXT = (
    "**A run with default settings** ({default} steps with the miniature's own settings, which are "
    "those of the preset `character`; {default_seeds}) has a likeness of {default_likeness} in 8 "
    "steps, on the undistilled base {default_likeness_c}. Compared with the untouched turbo, "
    "correct attributes change by {default_subject} points in prompts with the subject and by "
    "{default_free} in other prompts; for LoRAs of the undistilled base by {default_subject_c} and "
    "{default_free_c}. {verdict} At scale {scale}, likeness is {weak_likeness} and {weak_free} % "
    "of attributes are correct in other prompts."
)


def findings(results: Results) -> str:
    """The findings, in order of weight."""
    steps = results.steps("curve")
    first, half, last = steps[0], steps[-2:][0], steps[-1]

    def at(curve: Curve, condition: str, step: int = last) -> Estimate:
        return results.estimate(curve, condition, "curve", step)

    def apart(curve: Curve, one: str, other: str, step: int = last, digits: int = 2) -> str:
        return results.against(curve, one, other, "curve", step).text(digits)

    def percent(curve: Curve, step: int) -> str:
        found = results.against(curve, ADAPTER, DIRECT, "curve", step)
        scaled = Estimate(100 * found.mean, 100 * found.low, 100 * found.high)
        return f"{scaled.text(0).replace(' (', ' % (', 1)}"

    weaker = WEAKER[0]
    numbers = dict(
        seeds=_seeds(results, "curve", last),
        first=first,
        half=half,
        last=last,
        share_direct_first=_share(at(SHARE, DIRECT, first)),
        share_direct=_share(at(SHARE, DIRECT)),
        share_adapter=_share(at(SHARE, ADAPTER)),
        share_undistilled=_share(at(SHARE, UNDISTILLED)),
        blur_2_first=percent(SHARPNESS_2, first),
        blur_2=percent(SHARPNESS_2, last),
        blur_8_first=percent(SHARPNESS_8, first),
        blur_8=percent(SHARPNESS_8, last),
        blur_30_first=percent(SHARPNESS_30, first),
        blur_30=percent(SHARPNESS_30, last),
        merged_2=_share(1 - results.level(SHARPNESS_2, MERGED)),
        merged_8=_share(1 - results.level(SHARPNESS_8, MERGED)),
        sharp_ac=apart(SHARPNESS_2, ADAPTER, UNDISTILLED),
        drift_ac=apart(DRIFT, ADAPTER, UNDISTILLED, digits=3),
        likeness_ac=apart(LIKENESS, ADAPTER, UNDISTILLED),
        likeness_adapter=at(LIKENESS, ADAPTER).text(),
        likeness_direct=at(LIKENESS, DIRECT).text(),
        likeness_undistilled=at(LIKENESS, UNDISTILLED).text(),
        right_da=apart(SUBJECT_RIGHT, DIRECT, ADAPTER, digits=1),
        free_da_first=apart(FREE_RIGHT, DIRECT, ADAPTER, first, digits=1),
        free_da=apart(FREE_RIGHT, DIRECT, ADAPTER, digits=1),
        free_0=f"{results.level(FREE_RIGHT, TURBO):.1f}",
        free_adapter=at(FREE_RIGHT, ADAPTER).text(1),
        free_direct=at(FREE_RIGHT, DIRECT).text(1),
        free_undistilled=at(FREE_RIGHT, UNDISTILLED).text(1),
        drift_adapter=at(DRIFT, ADAPTER).text(3),
        drift_merged=f"{results.level(DRIFT, MERGED):.3f}",
        scale=f"{weaker.scale:g}",
        likeness_weak=at(replace(LIKENESS, way=weaker), ADAPTER).text(),
        free_weak=at(replace(FREE_RIGHT, way=weaker), ADAPTER).text(1),
        likeness_half=at(LIKENESS, ADAPTER, half).text(),
        free_half=at(FREE_RIGHT, ADAPTER, half).text(1),
    )
    opening, *points = [paragraph.format(**numbers) for paragraph in TEXT]
    numbered = [
        fill(f"{number}. {point}", WIDTH, subsequent_indent="   ", break_on_hyphens=False)
        for number, point in enumerate([*points, *_default(results)], start=1)
    ]
    return "\n".join([fill(opening, WIDTH), "", *numbered])


def _default(results: Results) -> list[str]:
    if not results.steps("default"):
        return []
    (step,) = results.steps("default")
    subject, free, subject_c, free_c = (
        results.against(curve, condition, "untouched", "default", step)
        for condition in (ADAPTER, UNDISTILLED)
        for curve in (SUBJECT_RIGHT, FREE_RIGHT)
    )
    within = [each.mean >= -3 for each in (subject, free)]
    kept = {
        (True, True): "That is within 3 points in both.",
        (True, False): "That is within 3 points with the subject, but not in other prompts.",
        (False, True): "That is within 3 points in other prompts, but not with the subject.",
        (False, False): "That is not within 3 points.",
    }
    text = DEFAULT_TEXT.format(
        default=step,
        default_seeds=_seeds(results, "default", step),
        default_subject=subject.text(1),
        default_free=free.text(1),
        default_subject_c=subject_c.text(1),
        default_free_c=free_c.text(1),
        default_likeness=results.estimate(LIKENESS, ADAPTER, "default", step).text(),
        default_likeness_c=results.estimate(LIKENESS, UNDISTILLED, "default", step).text(),
        verdict=kept[within[0], within[1]],
        scale=f"{WEAKER[0].scale:g}",
        weak_likeness=results.estimate(
            replace(LIKENESS, way=WEAKER[0]), ADAPTER, "default", step
        ).text(),
        weak_free=results.estimate(
            replace(FREE_RIGHT, way=WEAKER[0]), ADAPTER, "default", step
        ).text(1),
    )
    return [text]


def _seeds(results: Results, plan: str, step: int) -> str:
    count = len(results.seeds(plan, step))
    return f"{count} training seed{'' if count == 1 else 's'}"


def _share(value: Estimate | float) -> str:
    number = value.mean if isinstance(value, Estimate) else value
    return f"{round(100 * number)} %".replace("-", "−")
