"""python -m lab.experiments.preservation.screen: ways to leave other prompts as they are.

Each way trains one subject of the miniature's world and is measured on new prompts with the subject
and without it. Rows are written to a table as they are measured, and a way that is there is not
trained again.

B rows, C channels, H rows and W columns of latents, N trajectories, S steps of each.
"""

import argparse
import logging
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.archive import Archive
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.family import Family
from families.loading import load_family
from lab.experiments.drawing import Drawer
from lab.experiments.drawing import Way as Drawing
from lab.experiments.measures import adherence, subject_scores
from lab.experiments.preservation.ways import WAYS, Way
from lab.experiments.prompts import Prompt, free_prompts, subject_prompts
from lab.experiments.table import Table
from lab.experiments.training import training_adapter
from lab.experiments.zero_prior.captions import make_captions
from miniature.judge import load_judge
from miniature.lexicon import COLOURS, SHAPES
from miniature.world import caption, sample_scene
from trainer.data.dataset import read_dataset
from trainer.learning.features import Captions, encode_images
from trainer.learning.loop import Loop
from trainer.learning.loss import flow_loss, noisy
from trainer.learning.randomness import generator
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

log = logging.getLogger(__name__)
BASE, TOKEN = "miniature-turbo", "<zwx>"
FOLDER = Path("outputs/preservation")
PUBLISHED = Path(__file__).parent / "screen.jsonl"


def varied_prompts(count: int) -> list[str]:
    """Captions of scenes that pre-training may have seen; never those that are measured."""
    return [caption(sample_scene(200_000 + n, "train"), random.Random(f"keep {n}"))
            for n in range(count)]  # fmt: skip


def swapped_prompts(captions: Sequence[str], count: int) -> list[str]:
    """The dataset's captions with a shape in the place of the token, at times coloured."""
    found = []
    for n in range(count):
        r = random.Random(f"swap {n}")
        noun = r.choice(list(SHAPES.values()))[0]
        if r.random() < 0.5:
            noun = f"{r.choice(list(COLOURS.values()))[0]} {noun}"
        found.append(captions[n % len(captions)].replace(TOKEN, noun))
    return found


def plain(prompt: str) -> str:
    """A prompt without its colours."""
    words = "|".join(sorted((w for each in COLOURS.values() for w in each), key=len, reverse=True))
    text = re.sub(rf"\b(?:{words})\b ?", "", prompt)
    return re.sub(r"\ba(n?) (?=[aeiou])", "an ", re.sub(r"\ban (?=[^aeiou])", "a ", text))


@dataclass
class Kept:
    """What the base itself generates."""

    points_NSCHW: Tensor  # noisy latents on the way
    sigma_S: Tensor
    latents_NCHW: Tensor  # at the end
    velocity_NSCHW: Tensor  # of the base that generates
    prompts: list[str]


@torch.no_grad()
def generate(family: Family, prompts: Sequence[str]) -> Kept:
    """Trajectories of the base at its own number of steps."""
    steps = family.base.inference_steps
    side = 64
    sigma = family.sigmas(steps, side, side)
    points, velocities, ends = [], [], []
    for first in range(0, len(prompts), 16):
        texts = family.encode_prompts(prompts[first : first + 16])
        x = family.initial_noise(range(900_000 + first, 900_000 + first + len(texts)), side, side)
        xs, vs = [], []
        for n in range(steps):
            v = family.velocity(x, sigma[n].expand(len(x)).to(x), texts)
            xs.append(x)
            vs.append(v)
            x = x + (sigma[n + 1] - sigma[n]).to(x) * v
        points.append(torch.stack(xs, 1))
        velocities.append(torch.stack(vs, 1))
        ends.append(x)
    return Kept(
        torch.cat(points), sigma[:-1], torch.cat(ends), torch.cat(velocities), list(prompts)
    )


class Adapter:
    """The training adapter, which can be taken out of the transformer for a while."""

    def __init__(self, family: Family) -> None:
        adapter = training_adapter(family.base)
        modules = dict(family.transformer.named_modules())
        self.modules = [modules[name] for name in adapter.factors]
        self.pristine = [m.weight.data.clone() for m in self.modules]
        adapter.merge(family.transformer, family.base.name)
        self.merged = [m.weight.data for m in self.modules]

    @contextmanager
    def removed(self) -> Iterator[None]:
        for m, w in zip(self.modules, self.pristine, strict=True):
            m.weight.data = w
        yield
        for m, w in zip(self.modules, self.merged, strict=True):
            m.weight.data = w


class PreservingLoop(Loop):
    """The trainer's loop with rows in each step whose answer is to stay the base's."""

    def preserve(self, way: Way, kept: Kept | None, adapter: Adapter) -> None:
        self.way, self.kept, self.adapter = way, kept, adapter
        self.inputs: dict[str, Tensor] = {}

    def _rows(self, number: int) -> tuple[Tensor, Tensor, list[str], Tensor | None]:
        """latents and sigma to answer, prompts, and the answer where it is known."""
        way, kept = self.way, self.kept
        assert kept is not None
        r = generator(self.settings.seed, "preserve", number)
        which = torch.randint(len(kept.prompts), (way.rows,), generator=r)
        texts = [kept.prompts[int(k)] for k in which]
        if way.kind == "path":
            at = torch.randint(len(kept.sigma_S), (way.rows,), generator=r)
            known = kept.velocity_NSCHW[which, at] if way.without_adapter or way.own else None
            return kept.points_NSCHW[which, at], kept.sigma_S[at].float(), texts, known
        x0 = kept.latents_NCHW[which].clone()
        count = int(way.mix * way.rows)
        if count:
            seen = torch.randint(len(self.samples), (count,), generator=r)
            for k, s in enumerate(seen):
                x0[k] = self.samples[int(s)].mean_CHW
        noise = torch.randn(x0.shape, generator=r)
        sigma = torch.tensor([self.noise_levels.draw(x0.shape[1:], r) for _ in range(way.rows)])
        x = noisy(x0, noise, sigma)
        return x, sigma, texts, noise - x0 if way.kind == "flow" else None

    def _gradients(self, numbers: Sequence[int]) -> Tensor:
        way = self.way
        losses = []
        for number in numbers:
            latents, noise, sigma, captions = self.batch(number)
            text = self.captions.features(captions)
            loss = flow_loss(self.family, latents, noise, sigma, text) / len(numbers)
            if loss.requires_grad:
                loss.backward()
            losses.append(loss.detach())
            if way.kind == "none" or number % way.every:
                continue
            main = [p.grad.clone() if p.grad is not None else None for p in self.lora_parameters]
            x, sigma, texts, known = self._rows(number)
            features = self.captions.features(texts)
            with self.adapter.removed() if way.without_adapter else nullcontext():
                if known is None:
                    with torch.no_grad(), self.lora.lifted():  # type: ignore[union-attr]
                        known = self.family.velocity(x, sigma, features)
                answer = self.family.velocity(x, sigma, features)
                away = (answer - known).square().mean()
                (way.weight * away * way.every).backward()
            if way.project:
                self._project(main)
            self.away = away.detach()
        if way.penalty:
            self._penalise()
        return torch.stack(losses).sum()

    def _project(self, main: list[Tensor | None]) -> None:
        mine = [m if m is not None else torch.zeros_like(p) for m, p in
                zip(main, self.lora_parameters, strict=True)]  # fmt: skip
        keep = [_gradient(p) - m for p, m in zip(self.lora_parameters, mine, strict=True)]
        dot = sum(float((a * b).sum()) for a, b in zip(mine, keep, strict=True))
        if dot < 0:
            size = sum(float(b.square().sum()) for b in keep)
            for p, b in zip(self.lora_parameters, keep, strict=True):
                p.grad = _gradient(p) - dot / max(size, 1e-12) * b

    def collect(self, count: int = 512) -> None:
        """Inputs of every LoRA layer where the base works on other prompts."""
        hooks = []
        store: dict[str, list[Tensor]] = {}
        for name, layer in self.lora.layers.items():  # type: ignore[union-attr]

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                flat = args[0].detach().flatten(0, -2)
                pick = torch.randperm(len(flat))[:64]
                store.setdefault(name, []).append(flat[pick])

            hooks.append(layer.register_forward_pre_hook(hook))
        kept = self.kept
        assert kept is not None
        torch.manual_seed(0)
        with torch.no_grad():
            for _ in range(count // 64 * 4):
                which = torch.randint(len(kept.prompts), (8,))
                at = torch.randint(len(kept.sigma_S), (8,))
                self.family.velocity(
                    kept.points_NSCHW[which, at],
                    kept.sigma_S[at].float(),
                    self.captions.features([kept.prompts[int(k)] for k in which]),
                )
        for handle in hooks:
            handle.remove()
        for name, xs in store.items():
            x = torch.cat(xs)
            layer = self.lora.layers[name]  # type: ignore[union-attr]
            full = (x @ cast(Tensor, layer.base_layer.weight).T).square().sum()
            self.inputs[name] = x / full.sqrt()

    def _penalise(self) -> None:
        total = torch.zeros(())
        for name, x in self.inputs.items():
            layer = self.lora.layers[name]  # type: ignore[union-attr]
            total = total + (x @ layer.down.T @ layer.up.T).square().sum()
        (self.way.penalty * total).backward()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def train(way: Way, subject: str, seed: int, steps: int = 500) -> tuple[Archive, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        data = make_captions(subject, seed, TOKEN, Path(folder) / subject)
        inputs: dict[str, Any] = {
            "dataset": data, "base_model": BASE, "placeholder_token": TOKEN, "seed": seed,
            "steps": int(steps * way.steps), "validation_images": 0, "sample_every": 0}  # fmt: skip
        settings = resolve(TrainingInputs(**inputs | way.settings))
        family = load_family(settings.base, dtype=torch.float32)
        examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
        samples = encode_images(family, examples, settings)
    begun = time.perf_counter()
    swaps = swapped_prompts([s.caption for s in samples], int(way.swapped * way.prompts))
    prompts = varied_prompts(way.prompts - len(swaps)) + swaps
    prompts = [plain(p) if n < way.plain * way.prompts else p for n, p in enumerate(prompts)]
    wanted = way.kind != "none" or way.penalty
    kept = generate(family, prompts) if wanted else None
    prepared = time.perf_counter() - begun
    placeholder = Placeholder.create(TOKEN, family.text_width, settings.placeholder_init_std,
                                     settings.seed, family.device)  # fmt: skip
    captions = Captions(family, [s.caption for s in samples], {TOKEN: placeholder.vectors},
                        kept.prompts if kept else ())  # fmt: skip
    adapter = Adapter(family)
    if way.own:
        kept = generate(family, prompts)
    lora = Lora(family.transformer, family.lora_targets(), settings.rank, settings.seed)
    loop = PreservingLoop(family, settings, samples, captions, lora, placeholder)
    loop.preserve(way, kept, adapter)
    if way.penalty:
        loop.collect()
    begun, cpu = time.perf_counter(), time.process_time()
    for step in range(settings.steps):
        loop.step(step)
    took = {"prepared": prepared, "trained": time.perf_counter() - begun,
            "cpu": time.process_time() - cpu}  # fmt: skip
    factors, word = loop.final_weights()
    return Archive(factors, word, {}), took


class Measures:
    def __init__(self, subject_count: int = 48, free_count: int = 96) -> None:
        self.drawer = Drawer(BASE)
        self.drawing = Drawing("own", self.drawer.family.base.inference_steps)
        self.count, self.free = subject_count, free_prompts(free_count)

    def of(self, archive: Archive, subject: str, scale: float = 1.0) -> dict[str, Any]:
        self.drawing = Drawing("own", self.drawer.family.base.inference_steps, scale=scale)
        prompts = subject_prompts(subject, TOKEN, self.count)
        images = self.drawer.draw(archive, prompts, self.drawing)
        own, beside = _split(images, prompts)
        free = self.drawer.draw(archive, self.free, self.drawing)
        right = adherence(free, self.free)
        bleed = subject_scores(free, self.free, subject)
        return {
            "likeness": subject_scores(images, prompts, subject),
            "own": own, "beside": beside,
            "whole": [float(a == b) for a, b in zip(right["right"], right["asked"], strict=True)],
            "bleed": [float(x > 0.6) for x in bleed],
        }  # fmt: skip


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--subject", default="robot")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--table", default="screen.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    part, parts = map(int, options.part.split("/"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / options.table
    if not path.exists() and options.table == PUBLISHED.name:  # goes on with the published rows
        shutil.copy(PUBLISHED, path)
    table = Table(path)
    measures = Measures()
    key = {"subject": options.subject, "seed": options.seed, "steps": options.steps}
    if part == 1 and not table.find(way="base", subject=options.subject):
        untrained = Placeholder.create(TOKEN, measures.drawer.family.text_width, 1e-5, seed=0)
        scores = measures.of(Archive({}, untrained.detached(), {}), options.subject)
        table.add({"way": "base"} | key | scores)
    ways = [w for w in WAYS if not options.only or w.name in options.only]
    for number, way in enumerate(ways):
        if number % parts != part - 1 or table.find(way=way.name, **key):
            continue
        archive, took = train(way, options.subject, options.seed, options.steps)
        for scale in (1.0, *way.scales):
            name = way.name if scale == 1 else f"{way.name} x{scale:g}"
            row = {"way": name} | key | took | measures.of(archive, options.subject, scale)
            table.add(row)
            mean = {k: sum(v) / len(v) for k, v in row.items() if isinstance(v, list)}
            like = row["likeness"]
            mean |= {"alone": sum(like[::2]) / len(like[::2]), "recoloured": sum(like[1::4]) / 12, "company": sum(like[3::4]) / 12}
            print(name, {k: round(v, 3) for k, v in (mean | took).items()}, flush=True)


if __name__ == "__main__":
    main()
