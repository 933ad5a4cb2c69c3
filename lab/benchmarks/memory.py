"""python -m lab.benchmarks.memory CONFIG.yaml: holds a plan against the memory of real steps.

Needs a GPU, and no weights: models of the planned sizes are filled with random numbers. For every
mode that fits it trains a few steps and prints what was planned, what PyTorch's allocator saw at
most, and the seconds per step. The transformer's blocks and the text encoder's layers are compiled
as in training; with --plain they are not.
"""

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from adapters.lora import Lora
from families.family import Family, WeightStorage
from families.memory import RESERVE, free_memory
from families.quantization import apply_storage, quantize_transformer, usable
from families.recomputation import recompute
from families.without_weights import config_of, family_without_weights
from inference.acceleration import compile_blocks, compile_text_encoder
from trainer.learning.loss import flow_loss
from trainer.learning.optimizers import make_optimizer
from trainer.memory.fitting import TEXT_TOKENS, figures_of
from trainer.memory.plan import LADDER, Mode
from trainer.settings.config import read_config
from trainer.settings.fields import Settings

STEPS = 3


def filled(model: nn.Module, device: torch.device) -> Any:
    """The model with small random numbers for its weights, in bfloat16, frozen."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, device=device, dtype=torch.bfloat16)
            setattr(module, name, nn.Parameter(values.normal_(std=0.02), requires_grad=False))
    return model.eval().to(device)


def random_family(settings: Settings, mode: Mode, device: torch.device) -> Family:
    """The base of the settings at its planned size, as the mode has it."""
    family = family_without_weights(settings.base)
    family.device = device
    with init_empty_weights():
        transformer_class = family.model_class("transformer")
        transformer = transformer_class.from_config(config_of(settings.base, "transformer"))
    model = filled(transformer, device)
    where = torch.device("cpu") if mode.offload else device  # as the product has it
    model = model.to(where)
    if mode.quantize != "none":
        model = quantize_transformer(model, mode.quantize, where, torch.bfloat16)
    if mode.quantize != "none" or mode.offload:
        model = apply_storage(model, WeightStorage(mode.quantize, offload=mode.offload), device)
    vars(family)["transformer"] = model.requires_grad_(False)
    if settings.subject is not None:
        text_class = family.model_class("text_encoder")
        config = text_class.config_class.from_dict(config_of(settings.base, "text_encoder"))
        with init_empty_weights():
            encoder = family._reading_part(text_class(config))
        vars(family)["text_encoder"] = filled(encoder, device)
    recompute(family, mode.checkpointing)
    return family


@dataclass(frozen=True)
class Held:
    """One mode's plan and what came of it."""

    mode: Mode
    planned: int  # bytes
    measured: int | None = None  # bytes; None on a CPU, whose allocator does not count
    seconds: float | None = None  # of a step
    skipped: str = ""  # why it was not run

    @property
    def off(self) -> float | None:
        """The plan's error as a share."""
        return self.planned / self.measured - 1 if self.measured else None


def held_against_plan(
    settings: Settings,
    device: torch.device,
    modes: Sequence[Mode] = LADDER,
    backend: str | None = None,
) -> Iterator[Held]:
    """Every mode that can run here, with a few real steps; the others with the reason.

    `backend` compiles the models as in training; None: plain blocks, in the plan too.
    """
    counted = figures_of(settings, TEXT_TOKENS, torch.bfloat16, compiled=backend is not None)
    for mode in modes:
        planned = sum(counted.parts(mode).values())
        whole = counted.weights("none") + counted.text_weights("none")  # before it is quantized
        room = free_memory(device) * (1 - RESERVE)
        skipped, measured, seconds = "", None, None
        if mode.quantize not in ("none", *usable(device)):
            skipped = f"{mode.quantize} cannot run here"
        elif max(planned, whole) > room:
            skipped = f"{max(planned, whole) / 1e9:.1f} GB do not fit into {room / 1e9:.1f}"
        else:
            try:
                measured, seconds = measure(settings, mode, device, backend)
            except RuntimeError as error:  # the next modes are still worth knowing
                skipped = str(error).partition("\n")[0]
            torch._dynamo.reset()
        _empty(device)
        yield Held(mode, planned, measured or None, seconds, skipped)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def measure(
    settings: Settings, mode: Mode, device: torch.device, backend: str | None = None
) -> tuple[int, float]:
    """Peak bytes and seconds per step of real steps, compiled or not; 0 bytes on a CPU."""
    family = random_family(settings, mode, device)
    lora = Lora(family.transformer, family.lora_targets(settings.lora_targets), settings.rank, 0)
    if backend is not None:
        if settings.subject is not None:
            compile_text_encoder(family, backend)
        if not mode.offload:
            compile_blocks(family.transformer, backend, several_sizes=True)
    parameters = list(lora.parameters())
    optimizer = make_optimizer(settings.optimizer, parameters, 1e-4, 0.0)
    edge, batch = max(settings.resolutions), settings.batch_size
    rows, columns = family.latent_size(edge, edge)
    latents = torch.randn(batch, family.latent_channels, rows, columns, device=device)
    structure = family_without_weights(settings.base)
    width = structure.text_encoder.get_input_embeddings().weight.shape[1]
    text = torch.randn(batch, TEXT_TOKENS, width, device=device, dtype=torch.bfloat16)
    text.requires_grad_(settings.subject is not None)
    _empty(device)
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = 0.0
    for _ in range(STEPS):
        start = time.perf_counter()
        features = text
        if settings.subject is not None:
            called = family.text_encoder(inputs_embeds=text, use_cache=False)
            features = called.last_hidden_state
        sigma = torch.full((batch,), 0.5, device=device)
        flow_loss(family, latents, torch.randn_like(latents), sigma, [*features]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        text.grad = None
        if gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start  # of the last step; the first ones warm up
    return torch.cuda.max_memory_allocated(device) if gpu else 0, seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.memory", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    arguments = parser.parse_args()
    settings = read_config(arguments.config, dataset="imgs.zip")
    if not torch.cuda.is_available():
        raise SystemExit("error: this measures a GPU's memory, and there is none")
    device = torch.device("cuda")
    print(f"{'mode':<36}{'planned GB':>12}{'measured GB':>12}{'off by':>9}{'s/step':>9}")
    backend = None if arguments.plain else "inductor"
    for held in held_against_plan(settings, device, backend=backend):
        row = f"{held.mode.label:<36}{held.planned / 1e9:>12.1f}"
        if held.measured is None:
            print(f"{row}{'-':>12}  {held.skipped}")
        else:
            print(f"{row}{held.measured / 1e9:>12.1f}{held.off:>9.1%}{held.seconds:>9.2f}")


if __name__ == "__main__":
    main()
