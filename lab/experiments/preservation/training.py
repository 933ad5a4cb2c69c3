"""One training with a way to leave other prompts as they are.

B rows, C channels, H rows and W columns of latents, N trajectories, S steps of each.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.archive import Archive
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from adapters.trained_layers import LoraLinear
from families.family import Family
from families.loading import load_family
from lab.experiments.preservation.prompts import TOKEN, anchor_prompts, other_prompts
from lab.experiments.preservation.ways import SLOWER, Way
from lab.experiments.training import training_adapter
from lab.experiments.zero_prior.captions import make_captions
from trainer.data.dataset import read_dataset
from trainer.learning.features import Captions, encode_images
from trainer.learning.loop import Loop
from trainer.learning.loss import flow_loss, noisy
from trainer.learning.preservation import Preservation, preservation_prompts
from trainer.learning.randomness import generator
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

Encode = Callable[[Sequence[str]], Sequence[Tensor]]


@dataclass
class Kept:
    """What the base itself generates."""

    points_NSCHW: Tensor  # noisy latents on the way
    sigma_S: Tensor
    latents_NCHW: Tensor  # at the end
    velocity_NSCHW: Tensor  # of the base that generates
    prompts: list[str]


@torch.no_grad()
def generate(
    family: Family, prompts: Sequence[str], encode: Encode | None = None, guidance: float = 0.0
) -> Kept:
    """Trajectories of the model at its own number of steps."""
    steps = family.base.inference_steps
    side = 64
    sigma = family.sigmas(steps, side, side)
    points, velocities, ends = [], [], []
    for first in range(0, len(prompts), 16):
        texts = (encode or family.encode_prompts)(prompts[first : first + 16])
        x = family.initial_noise(range(900_000 + first, 900_000 + first + len(texts)), side, side)
        xs, vs = [], []
        for n in range(steps):
            v = family.velocity(x, sigma[n].expand(len(x)).to(x), texts)
            if guidance:
                empty = (encode or family.encode_prompts)([family.empty_prompt] * len(x))
                v = v + guidance * (v - family.velocity(x, sigma[n].expand(len(x)).to(x), empty))
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

    def __init__(self, family: Family, wanted: bool = True) -> None:
        if not (wanted and family.base.training_adapters):
            self.modules: list[Any] = []
            self.pristine: list[Tensor] = []
            self.merged: list[Tensor] = []
            return
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
        self.anchors: Kept | None = None
        if way.penalty:
            self.collect()

    def _rows(self, number: int) -> tuple[Tensor, Tensor, list[str], Tensor | None]:
        """latents and sigma to answer, prompts, and the answer where it is known."""
        way, kept = self.way, self.kept
        assert kept is not None
        r = generator(self.settings.seed, "preserve", number)
        which = torch.randint(len(kept.prompts), (way.rows,), generator=r)
        texts = [kept.prompts[int(k)] for k in which]
        if way.anchors:
            return self._anchored(r)
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

    @property
    def begun(self) -> bool:
        """Whether the anchors are held by now."""
        return self.done >= self.way.begins * self.settings.steps

    def _anchored(self, random: torch.Generator) -> tuple[Tensor, Tensor, list[str], Tensor]:
        """Rows of other prompts, and of the subject as the model has it when they begin."""
        way = self.way
        if self.anchors is None and self.begun:
            with scaled(self.lora, way.anchor_scale):
                prompts = anchor_prompts(way.anchors, way.companions)
                features, guidance = self.captions.features, way.anchor_guidance
                self.anchors = generate(self.family, prompts, features, guidance)
        count = round(way.anchored * way.rows) if self.begun else 0
        rows: list[tuple[Tensor, Tensor, str, Tensor]] = []
        for kept, size in ((self.kept, way.rows - count), (self.anchors, count)):
            for _ in range(size):
                assert kept is not None
                which = int(torch.randint(len(kept.prompts), (), generator=random))
                at = int(torch.randint(len(kept.sigma_S), (), generator=random))
                rows.append((kept.points_NSCHW[which, at], kept.sigma_S[at].float(),
                             kept.prompts[which], kept.velocity_NSCHW[which, at]))  # fmt: skip
        x, sigma, texts, known = zip(*rows, strict=True)
        return torch.stack(x), torch.stack(sigma), list(texts), torch.stack(known)

    def _gradients(self, numbers: Sequence[int]) -> Tensor:
        way = self.way
        if not way.changes_the_loop:
            return super()._gradients(numbers)
        losses = []
        for number in numbers:
            latents, noise, sigma, captions = self.batch(number)
            loss = self._loss(latents, noise, sigma, captions) / len(numbers)
            loss.backward()
            losses.append(loss.detach())
            if way.kind == "none" or number % way.every or not (self.begun or way.early):
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

    def _loss(
        self, latents: Tensor, noise: Tensor, sigma: Tensor, captions: Sequence[str]
    ) -> Tensor:
        """The flow-matching loss, or with a target that guidance has moved."""
        text = self.captions.features(captions)
        if not self.way.guided:
            return flow_loss(self.family, latents, noise, sigma, text)
        x = noisy(latents, noise, sigma)
        with torch.no_grad():
            empty = self.captions.features([self.family.empty_prompt] * len(captions))
            guidance = self.family.velocity(x, sigma, text) - self.family.velocity(x, sigma, empty)
        target = noise - latents + self.way.guided * guidance
        return (self.family.velocity(x, sigma, text) - target).square().mean()

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
            layer = cast(LoraLinear, self.lora.layers[name])  # type: ignore[union-attr]
            total = total + (x @ layer.down.T @ layer.up.T).square().sum()
        (self.way.penalty * total).backward()


@contextmanager
def scaled(lora: Lora | None, scale: float) -> Iterator[None]:
    """Within the context, the LoRA has that scale."""
    assert lora is not None
    ups = [cast(LoraLinear, layer).up for layer in lora.layers.values()]
    before = [up.data.clone() for up in ups]
    for up in ups:
        up.data.mul_(scale)
    yield
    for up, was in zip(ups, before, strict=True):
        up.data.copy_(was)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def train(
    way: Way, base: str, subject: str, seed: int, steps: int
) -> tuple[Archive, dict[str, float]]:
    """Trains `subject` in one way. Returns what is shipped, and seconds of the parts."""
    with tempfile.TemporaryDirectory() as folder:
        data = make_captions(subject, seed, TOKEN, Path(folder) / subject)
        inputs: dict[str, Any] = {
            "dataset": data, "base_model": base, "placeholder_token": TOKEN, "seed": seed,
            "steps": round(steps * way.steps), "validation_images": 0, "sample_every": 0,
            "caption_dropout": 0.0, "preserve": "off"} | SLOWER  # fmt: skip
        settings = resolve(TrainingInputs(**inputs | way.settings))
        family = load_family(settings.base, dtype=torch.float32)
        examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
        samples = encode_images(family, examples, settings)
    placeholder = Placeholder.create(TOKEN, family.text_width, settings.placeholder_init_std,
                                     settings.seed, family.device)  # fmt: skip
    wanted = way.kind != "none" or way.penalty > 0
    prompts = other_prompts(way, [each.caption for each in samples]) if wanted else []
    preserved = preservation_prompts(settings)
    texts = [each.caption for each in samples] + anchor_prompts(way.anchors, way.companions)
    captions = Captions(family, texts, {TOKEN: placeholder.vectors}, [*prompts, *preserved.all])
    cpu = time.process_time()
    kept = generate(family, prompts) if wanted and not way.own else None
    adapter = Adapter(family, settings.turbo_adapter != "none")
    if wanted and way.own:
        kept = generate(family, prompts)
    ours = Preservation(family, settings, captions, preserved) if settings.preserve else None
    prepared = time.process_time() - cpu
    lora = Lora(
        family.transformer, family.lora_targets(settings.lora_targets), settings.rank, settings.seed
    )
    loop = PreservingLoop(
        family, settings, samples, captions, lora, [placeholder], preservation=ours
    )
    loop.preserve(way, kept, adapter)
    cpu = time.process_time()
    for step in range(settings.steps):
        loop.step(step)
    took = {"prepared_cpu": prepared, "cpu": time.process_time() - cpu}
    return Archive(*loop.final_weights(), {}), took
