"""What is measured of one training's result."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.archive import Archive
from adapters.placeholder import Placeholder
from lab.experiments.drawing import Drawer
from lab.experiments.drawing import Way as Drawing
from lab.experiments.measures import bleed, fully_right, subject_scores
from lab.experiments.preservation.prompts import TOKEN
from lab.experiments.prompts import Prompt, free_prompts, subject_prompts
from miniature.drawing import grid, render
from miniature.judge import load_judge

SHOWN = 8  # images of each kind that are kept


class Measures:
    """Generates with the LoRA always applied, and reads the images."""

    def __init__(self, base: str, subject_count: int = 48, free_count: int = 96) -> None:
        self.drawer = Drawer(base)
        own = self.drawer.family.base
        # The miniature's samplers count guidance from 0, which is off.
        self.guidance = 0.0 if own.distilled else own.guidance_scale - 1
        self.count, self.free = subject_count, free_prompts(free_count)

    def untrained(self) -> Archive:
        """The base with the token as it begins."""
        word = Placeholder.create(TOKEN, self.drawer.family.text_width, 1e-5, seed=0)
        return Archive({}, (word.detached(),), {})

    def of(
        self, archive: Archive, subject: str, scale: float = 1.0, steps: int | None = None,
        strip: Path | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Scores of each image; the first ones are saved as `strip`."""
        steps = steps or self.drawer.family.base.inference_steps
        way = Drawing("own", steps, guidance=self.guidance, scale=scale)
        prompts = subject_prompts(subject, TOKEN, self.count)
        images = self.drawer.draw(archive, prompts, way)
        free = self.drawer.draw(archive, self.free, way)
        if strip is not None:
            strip.parent.mkdir(parents=True, exist_ok=True)
            shown = [*images[:SHOWN], *free[:SHOWN]]
            grid(shown, columns=SHOWN, gap=0).save(strip, optimize=True)
        return self._scores(subject, prompts, images, free)

    def of_base(self, subject: str) -> dict[str, Any]:
        """Scores of the base with the token as it begins."""
        return self.of(self.untrained(), subject)

    def of_renderings(self, subject: str) -> dict[str, Any]:
        """Scores of renderings of the prompts' scenes: the most that the judge gives."""
        prompts = subject_prompts(subject, TOKEN, self.count)
        images, free = ([render(each.scene) for each in some] for some in (prompts, self.free))
        return self._scores(subject, prompts, images, free)

    def _scores(
        self,
        subject: str,
        prompts: Sequence[Prompt],
        images: Sequence[Image.Image],
        free: Sequence[Image.Image],
    ) -> dict[str, Any]:
        own, beside = _split(images, prompts)
        return {
            "likeness": subject_scores(images, prompts, subject),
            "own": own,
            "beside": beside,
            "whole": fully_right(free, self.free),
            "bleed": bleed(free, self.free, subject),
        }


def _split(images: Sequence[Any], prompts: Sequence[Prompt]) -> tuple[list[float], list[float]]:
    """Shares of attributes right: the rest of the scene, and the thing beside the subject."""
    own: list[float] = []
    beside: list[float] = []
    for view, prompt in zip(load_judge().read(images), prompts, strict=True):
        sides = ("",) if len(prompt.scene.things) == 1 else ("left.", "right.")
        other = {s for s, t in zip(sides, prompt.scene.things, strict=True) if not t.is_subject}
        for key, value in prompt.asked.items():
            ok = float(view.get(key) == value)
            (beside if key.partition(".")[0] + "." in other else own).append(ok)
    return own, beside
