"""python -m benchmarks.memory CONFIG.yaml: holds a plan against the memory of real steps.

Needs a GPU, and no weights: models of the planned sizes are filled with random numbers. For every
mode that fits it trains a few steps and prints what was planned, what PyTorch's allocator saw at
most, and the seconds per step.
"""

import argparse
import gc
import time
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from adapters.lora import Lora
from families.family import Family
from families.memory import RESERVE, free_memory
from families.quantization import Residence, quantize_transformer, settle_linears
from families.sketch import configs, sketch
from trainer.config import read_config
from trainer.fitting import TEXT_TOKENS, figures_of, usable
from trainer.loss import flow_loss
from trainer.optimizers import make_optimizer
from trainer.plan import LADDER, Mode
from trainer.settings import Settings

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
    family = sketch(settings.base)
    found = configs(settings.base)
    family.device = device
    with init_empty_weights():
        transformer = family.transformer_class.from_config(found["transformer"])
    model = filled(transformer, device)
    if mode.quantize != "none":
        model = quantize_transformer(model, mode.quantize, device, torch.bfloat16)
    if mode.quantize != "none" or mode.offload:
        model = settle_linears(model, Residence(mode.quantize, offload=mode.offload), device)
    vars(family)["transformer"] = model.requires_grad_(False)
    if settings.subject is not None:
        config = family.text_encoder_class.config_class.from_dict(found["text_encoder"])
        with init_empty_weights():
            encoder = family._reading_part(family.text_encoder_class(config))
        vars(family)["text_encoder"] = filled(encoder, device)
    if mode.checkpointing:
        model.enable_gradient_checkpointing()
    return family


def measure(settings: Settings, mode: Mode, device: torch.device) -> tuple[int, float]:
    """Peak bytes and seconds per step of real steps."""
    family = random_family(settings, mode, device)
    lora = Lora(family.transformer, family.lora_targets(settings.lora_targets), settings.rank, 0)
    parameters = list(lora.parameters())
    optimizer = make_optimizer(settings.optimizer, parameters, 1e-4, 0.0)
    edge, batch = max(settings.resolutions), settings.batch_size
    rows, columns = family.latent_size(edge, edge)
    latents = torch.randn(batch, family.latent_channels, rows, columns, device=device)
    width = sketch(settings.base).text_encoder.get_input_embeddings().weight.shape[1]
    text = torch.randn(batch, TEXT_TOKENS, width, device=device, dtype=torch.bfloat16)
    text.requires_grad_(settings.subject is not None)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = 0.0
    for _ in range(STEPS):
        torch.cuda.synchronize()
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
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start  # of the last step; the first ones warm up
    return torch.cuda.max_memory_allocated(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    settings = read_config(parser.parse_args().config, dataset="imgs.zip")
    if not torch.cuda.is_available():
        raise SystemExit("error: this measures a GPU's memory, and there is none")
    device = torch.device("cuda")
    counted = figures_of(settings, TEXT_TOKENS, torch.bfloat16)
    print(f"{'mode':<36}{'planned GB':>12}{'measured GB':>12}{'off by':>9}{'s/step':>9}")
    for mode in LADDER:
        planned = sum(counted.parts(mode).values())
        whole = counted.weights("none") + counted.text_weights("none")  # before it is quantised
        room = free_memory(device) * (1 - RESERVE)
        if mode.quantize not in ("none", *usable(device)) or max(planned, whole) > room:
            print(f"{mode.label:<36}{planned / 1e9:>12.1f}{'-':>12}")
            continue
        measured, seconds = measure(settings, mode, device)
        gc.collect()
        torch.cuda.empty_cache()
        off = planned / measured - 1
        print(
            f"{mode.label:<36}{planned / 1e9:>12.1f}{measured / 1e9:>12.1f}{off:>9.1%}"
            f"{seconds:>9.2f}"
        )


if __name__ == "__main__":
    main()
