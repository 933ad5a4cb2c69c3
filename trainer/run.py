"""One training from settings to weights.zip: the story of `trainer`, in order."""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.archive import Archive, write_archive
from adapters.lora import Lora
from adapters.placeholder import Placeholder, check_token
from adapters.turbo import TurboAdapter
from families.family import Family
from families.loading import load_family
from families.repository import adapter_path
from families.tokens import ids_wanted
from inference.engine import Engine
from inference.images import save_images
from inference.request import Request
from trainer import meta
from trainer.checkpoint import Checkpoint
from trainer.dataset import Example, read_dataset
from trainer.features import Captions, encode_pictures
from trainer.loop import Diverged, Loop, Report
from trainer.resume import continue_weights, read_resume
from trainer.settings import Settings, settle
from trainer.zero_prior import ZeroPriorProof

log = logging.getLogger(__name__)

WEIGHTS = "weights.zip"
CHECKPOINTS = "checkpoints"


def train_from_inputs(report: Report | None = None, **inputs: Any) -> Path:
    """Trains with the inputs of the Cog face, None standing for what was left out."""
    return train(settle(**inputs), report)


def train(settings: Settings, report: Report | None = None) -> Path:
    """Trains and returns the path of the finished weights.zip, which appears all at once.

    Everything that can be wrong with settings and data is found before a model is loaded.
    """
    path = _train(settings, report)  # all it held in memory is gone before anything is drawn
    _draw_samples(settings, path)
    return path


def _train(settings: Settings, report: Report | None) -> Path:
    # What can be checked without a model.
    examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
    resume = read_resume(settings)
    adapter = _turbo_adapter(settings)
    folder = settings.output_dir or _output_folder()
    folder.mkdir(parents=True, exist_ok=True)
    family = load_family(settings.base)
    if settings.subject is not None:
        check_token(settings.subject, family.prompts)
    _introduce(settings, examples, family)

    # Encode, once.
    samples = encode_pictures(family, examples, settings)
    placeholder, proof = None, None
    if settings.subject is not None:
        placeholder = Placeholder.create(
            settings.subject,
            family.text_width,
            settings.placeholder_init_std,
            settings.seed,
            family.device,
        )
        proof = ZeroPriorProof(family, placeholder)
        log.info(
            "%s is token %d, norm %.3g at the start",
            *(placeholder.token, proof.token_id, proof.norm_start),
        )
    vectors = {placeholder.token: placeholder.vectors} if placeholder is not None else {}
    captions = Captions(family, [sample.caption for sample in samples], vectors)

    # Train.
    transformer = family.transformer
    if adapter is not None:
        share, count = adapter.merge(transformer, settings.base.name), len(adapter.factors)
        log.info("%s: merged %d of %d, |dW|/|W| = %.4g", adapter.name, count, count, share)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    lora = Lora(transformer, family.lora_targets(), settings.rank, settings.seed)
    log.info("LoRA of rank %d on %d layers", settings.rank, len(lora.layers))
    loop = Loop(family, settings, samples, captions, lora, placeholder)
    if isinstance(resume, Checkpoint):
        loop.restore(resume)
    elif resume is not None:
        continue_weights(resume, lora, placeholder)
    trained = loop.run(report, folder / CHECKPOINTS)

    # Prove and write.
    zero_prior = proof.result(trained.row_norms) if proof is not None else None
    if zero_prior is not None:
        log.info("zero prior: %s", ", ".join(f"{k} {v:.4g}" for k, v in zero_prior.items()))
    if not loop.finite():
        raise Diverged("what was trained holds NaN or infinity; lower learning_rate")
    archive = Archive(
        lora.factors(),
        placeholder.detached() if placeholder is not None else None,
        meta.describe(settings, examples, trained, zero_prior, adapter),
    )
    path = write_archive(archive, folder / WEIGHTS)
    log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return path


def _turbo_adapter(settings: Settings) -> TurboAdapter | None:
    """The adapter that `turbo_adapter` asks for; None is said aloud on a distilled base."""
    wanted, base = settings.turbo_adapter, settings.base
    if wanted == "auto" and base.training_adapters:
        wanted = list(base.training_adapters)[-1]
    if wanted in ("auto", "none"):
        if base.distilled:
            log.warning(
                "%s is distilled to %d steps, and no turbo adapter is used: training will wear "
                "that off, and pictures of few steps will blur",
                *(base.name, base.inference_steps),
            )
        return None
    file = base.training_adapters.get(wanted)
    return TurboAdapter.read(adapter_path(file) if file else Path(wanted).expanduser())


def _output_folder() -> Path:
    """`outputs/` in the working folder where that can be written, else a temporary folder."""
    folder = Path("outputs")
    writable = os.access(folder if folder.exists() else Path.cwd(), os.W_OK)
    return folder if writable else Path(tempfile.mkdtemp(prefix="zeroprior-training-"))


def _introduce(settings: Settings, examples: Sequence[Example], family: Family) -> None:
    """Says what is about to happen."""
    log.info(
        "training on %s: %d pictures, %s, %d steps of %d, seed %d",
        *(settings.base.hub_id, len(examples), settings.training_mode),
        *(settings.steps, settings.batch_size, settings.seed),
    )
    if settings.log_prompt_ids or ids_wanted():
        rows = {settings.subject: torch.zeros(1, 1)} if settings.subject is not None else {}
        log.info("template around every prompt: %r", family.prompts.template)
        for caption in dict.fromkeys(example.caption for example in examples):
            log.info("prompt: %r\n%s", caption, family.tokenize(caption, rows).explain())


def _draw_samples(settings: Settings, weights: Path) -> None:
    """Draws the sample prompts with the finished archive, as a prediction would."""
    if not settings.sample_prompts:
        return
    engine = Engine()
    archive = engine.read(weights)
    folder = settings.base.folder  # a base given by its path is found by that path alone
    base_model = str(folder) if folder and folder.is_dir() else settings.base.hub_id
    for number, prompt in enumerate(settings.sample_prompts):
        options = {"seed": settings.seed, **settings.sample_options}
        images = engine.draw(Request(prompt=prompt, **options), archive, base_model)
        saved = save_images(images, weights.parent / "samples" / f"{number:02d}")
        log.info("drew %r: %s", prompt, ", ".join(map(str, saved)))
