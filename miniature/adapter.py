"""Stage 4: the training adapter, by the published recipe.

A LoRA at a low rate with the plain flow-matching loss on the turbo model's own pictures, until
the distillation is undone. What breaks, breaks in the adapter: a user's LoRA trained on top of it
leaves turbo's eight steps alone once the adapter is gone again.

B batch, C channels, H rows, W columns of latents.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

from miniature.batched import batched_forward
from miniature.checkpoint import Checkpoint
from miniature.device import DEVICE, bfloat16_products
from miniature.distill import training_prompts
from miniature.parallel import average_gradients, gather_rows, rank, rows
from miniature.pretrain import sample_sigmas
from miniature.sampling import Base, encode_prompts, sample_latents
from miniature.weights import ADAPTER_PREFIX

# The eight linears of a joint block, as in the published adapter.
TARGETS = r"layers\.\d+\.(attention\.to_[qkv]|attention\.to_out\.0|feed_forward\.w[123]|adaLN_modulation\.0)"  # noqa: E501


@dataclass(frozen=True)
class AdapterSettings:
    pictures: int = 1024  # drawn by the turbo model in its eight steps
    steps: int = 300
    batch: int = 64
    rank: int = 16
    learning_rate: float = 5e-4
    caption_dropout: float = 0.1
    sigma_shift: float = 2.0
    seed: int = 0


def own_pictures(turbo: Base, path: Path, settings: AdapterSettings) -> Tensor:
    """float16 latents [N, C, H, W] that turbo draws for `training_prompts`, kept at `path`."""
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    prompts = training_prompts(settings.pictures, "adapter")
    mine = range(settings.pictures)[rows(settings.pictures)]
    turbo = replace(turbo, forward=torch.compile(batched_forward, dynamic=False))
    chunks = []
    for first in trange(0, len(mine), 64, desc="own pictures", disable=rank() > 0):
        numbers = mine[first : first + 64]
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + numbers[0])
        noise = torch.randn(
            (len(numbers), turbo.transformer.config.in_channels, 16, 16), generator=generator
        ).to(DEVICE)
        with bfloat16_products():
            text = encode_prompts(turbo, [prompts[i] for i in numbers])
            chunks.append(sample_latents(turbo, noise, text, 8).half().cpu())
    pictures = gather_rows(torch.cat(chunks))
    if rank() == 0:
        torch.save(pictures, path)
    return pictures


def train_adapter(
    turbo: Base, work: Path, settings: AdapterSettings | None = None
) -> dict[str, Tensor]:
    """The adapter's tensors in the published format, bfloat16, alpha equal to the rank.

    `turbo.transformer` carries a PEFT adapter afterwards. Goes on from `work/adapter.pt`.
    """
    settings = settings or AdapterSettings()
    pictures = own_pictures(turbo, work / "own_pictures.pt", settings)
    prompts = training_prompts(len(pictures), "adapter")
    torch.manual_seed(settings.seed)
    transformer = turbo.transformer
    transformer.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS)
    )
    trained = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.learning_rate, weight_decay=0.0)
    checkpoint, first = Checkpoint(work / "adapter.pt"), 0
    if state := checkpoint.load():
        transformer.load_state_dict(state["adapter"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    mine, smooth = rows(settings.batch), 0.0
    progress = trange(first, settings.steps, initial=first, total=settings.steps, desc="adapter",
                      disable=rank() > 0)  # fmt: skip
    for step in progress:
        optimizer.param_groups[0]["lr"] = settings.learning_rate * min(
            1.0, (step + 1) / 50, 4 * (1 - step / settings.steps)
        )
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        picks = torch.randint(len(pictures), (settings.batch,), generator=generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.caption_dropout
        noise = torch.randn((settings.batch, *pictures.shape[1:]), generator=generator)
        sigma_B = sample_sigmas(settings.batch, settings.sigma_shift, generator)[mine].to(DEVICE)
        chosen = ["" if drop else prompts[i]
                  for i, drop in zip(picks.tolist(), dropped.tolist(), strict=True)]  # fmt: skip
        clean, noise = pictures[picks[mine]].float().to(DEVICE), noise[mine].to(DEVICE)
        sigma_B111 = sigma_B[:, None, None, None]
        noised = (1 - sigma_B111) * clean + sigma_B111 * noise
        with bfloat16_products():
            text = encode_prompts(turbo, chosen[mine])
            out = batched_forward(transformer, noised, 1 - sigma_B, text.text_BLD, text.mask_BL)
        loss = (out.float() - (clean - noise)).square().mean()
        loss.backward()
        average_gradients(trained.values())
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = float(loss) if step == first else 0.97 * smooth + 0.03 * float(loss)
        progress.set_postfix(loss=f"{smooth:.4f}")
        if rank() == 0 and (checkpoint.due() or step + 1 == settings.steps):
            checkpoint.save({"adapter": trained, "optimizer": optimizer.state_dict(),
                             "step": step + 1})  # fmt: skip
    return {
        ADAPTER_PREFIX + key: value.detach().to("cpu", torch.bfloat16).contiguous()
        for key, value in get_peft_model_state_dict(transformer).items()
    }


def save_adapter(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes the adapter; its file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    save_file(tensors, scratch)
    scratch.rename(path)
