"""One training from settings to weights.zip: the story of `trainer`, in order."""

import ctypes
import gc
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapters.lora import Lora
from adapters.placeholder import Placeholder, check_token
from adapters.turbo import TurboAdapter
from families.family import Family
from families.few_steps import find_few_step_lora
from families.loading import load_family
from families.quantization import PLAIN
from families.repository import adapter_path
from families.tokens import ids_wanted
from inference import acceleration
from trainer import meta
from trainer.checkpoint import Checkpoint
from trainer.dataset import Example, read_dataset
from trainer.distributed import processes, same_for_all
from trainer.features import Captions, encode_pictures
from trainer.fitting import RanOut, TooLarge, fit, running_out
from trainer.judging import Outcome, hand_over, judge
from trainer.loop import Diverged, Loop, Report
from trainer.outputs import CHECKPOINTS, WEIGHTS, default_folder, make_room
from trainer.previews import Previews
from trainer.publish import check_repository, publish
from trainer.report import Told
from trainer.resume import continue_weights, data_identity, read_resume
from trainer.secret import Secret, Secrets
from trainer.settings import Settings, settle
from trainer.stage import SecondBase, Stage
from trainer.trackers import Trackers
from trainer.trigger import name_trigger
from trainer.validation import Validation, hold_out
from trainer.watching import Watching
from trainer.zero_prior import ZeroPriorProof

log = logging.getLogger(__name__)


@contextmanager
def _given_back() -> Iterator[None]:
    """Whatever comes of what is done inside, the memory that it took is free when it ends.

    An error's frames are emptied, since whoever hears of it would else keep all they worked with.
    """
    try:
        yield
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        _give_back_memory()


def _let_go(error: BaseException) -> None:
    """Empties the frames that an error has come through, and what it came from."""
    traceback.clear_frames(error.__traceback__)
    for earlier in filter(None, {error.__cause__, error.__context__}):  # often the same
        _let_go(earlier)


def _give_back_memory() -> None:
    """Frees what a training has left in reference cycles, and gives it to the system, or the GPU.

    On Cog's server trainings run in several threads in turn, and glibc keeps what is freed for the
    thread that had it: hundreds of MB, with the miniature.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def train_from_inputs(
    report: Report | None = None,
    *,
    alone: bool = False,
    wandb_api_key: Any = None,
    hf_token: Any = None,
    **inputs: Any,
) -> Path:
    """Trains with the inputs of the Cog face, None standing for what was left out.

    With `alone`, what an earlier training has left in the folder is removed first, unless this
    one goes on from there: on a server it may be another customer's.
    """
    secrets = Secrets(Secret.of(wandb_api_key), Secret.of(hf_token))
    return train(settle(**inputs), report, secrets, alone)


@_given_back()
def train(
    settings: Settings,
    report: Report | None = None,
    secrets: Secrets | None = None,
    alone: bool = False,
) -> Path:
    """Trains and returns the path of the finished weights.zip, which appears all at once.

    Everything that can be wrong with settings, data and accounts is found before a model is
    loaded. Out of a GPU's memory, it is tried once more in the next leaner mode, and `TooLarge`
    is raised where that does not help. `alone` keeps nothing of an earlier training's files.
    """
    secrets = secrets or Secrets()
    if settings.hf_repo_id:
        check_repository(settings.hf_repo_id, secrets.hf_token)
    settings = replace(settings, seed=same_for_all(settings.seed))
    if torch.cuda.is_available():
        _give_back_memory()  # of what came before, since a GPU's free memory is counted
    tried: list[str] = []
    while True:
        try:
            with ExitStack() as until_written:
                path, outcome = _train(settings, report, secrets, until_written, alone)
                if outcome is not None:  # all else that the training held in memory is gone by now
                    hand_over(outcome)
            break
        except RanOut as short:
            tried.append(str(short.mode))
            if short.leaner is None or len(tried) > 1 or processes().num_processes > 1:
                raise TooLarge(
                    f"out of memory, tried with: {'; '.join(tried)}. Lower resolution, batch_size "
                    "or rank, leave quantize and low_memory on auto, or take a larger GPU"
                ) from short.__cause__
            settings, alone = short.leaner, False
        _give_back_memory()  # only here, where no frame of the first attempt is left
        log.warning("trying once more in the next leaner mode")
    processes().wait_for_everyone()
    if outcome is not None and settings.hf_repo_id:
        publish(path, settings.hf_repo_id, secrets.hf_token)
    return path


def _train(
    settings: Settings,
    report: Report | None,
    secrets: Secrets,
    until_written: ExitStack,
    alone: bool,
) -> tuple[Path, Outcome | None]:
    """The weights' place and, in the main process of several, what is left to be judged."""
    # What can be checked without a model.
    examples = read_dataset(
        settings.dataset,
        settings.default_caption,
        settings.subject,
        settings.caption_prefix,
        settings.caption_suffix,
        settings.skip_bad_images,
    )
    examples = name_trigger(examples, settings.trigger_word)
    settings = settings.for_pictures(len(examples))
    resume = read_resume(settings, examples)
    adapter = _turbo_adapter(settings)
    folder = settings.output_dir or default_folder()
    make_room(folder, alone and not _goes_on_from(folder, settings.resume_from))
    trackers = until_written.enter_context(Trackers(settings, folder, secrets.wandb_api_key))
    family = load_family(settings.base)
    if settings.subject is not None:
        check_token(settings.subject, family.prompts)
    targets = family.lora_targets(settings.lora_targets)
    _introduce(settings, examples, family)
    memory = fit(settings, family, [example.caption for example in examples])
    family.reside(memory.residence)
    until_written.enter_context(running_out(settings, family, memory.mode, folder / CHECKPOINTS))

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
    trained_on, held_out = hold_out(samples, settings)

    # Train.
    def merge(transformer: nn.Module) -> None:
        if adapter is not None:
            share, count = adapter.merge(transformer, settings.base.name), len(adapter.factors)
            log.info("%s: merged %d of %d, |dW|/|W| = %.4g", adapter.name, count, count, share)

    if memory.mode.quantize != "none":
        stage: Stage = SecondBase(family)
        transformer = family.load_transformer(merge)  # what is merged is quantised with the rest
    else:
        transformer = family.transformer
        stage = Stage(family, adapter if settings.sample_prompts else None)
        merge(transformer)
    if memory.mode.checkpointing:
        transformer.enable_gradient_checkpointing()
    lora = Lora(transformer, targets, settings.rank, settings.seed)
    log.info("LoRA of rank %d on %d layers", settings.rank, len(lora.layers))
    if memory.residence == PLAIN and acceleration.wanted_in_training(family.device):
        log.info("compiling the blocks; the first steps wait for it")
        acceleration.compile_blocks(transformer)
    data = data_identity(examples)
    loop = Loop(family, settings, trained_on, captions, lora, placeholder, data)
    if isinstance(resume, Checkpoint):
        loop.restore(resume)
    elif resume is not None:
        continue_weights(resume, lora, placeholder)
    validation = Validation(loop, held_out)
    previews = Previews(family, settings, stage, folder)
    watching = Watching(trackers, validation.curves, previews.album)
    until_written.callback(watching.send)  # what is drawn with the finished weights
    watchers = (validation, previews, watching)
    if loop.processes.is_main_process:
        for each in watchers:
            each.begin(loop)
    with _heard_out():
        trained = loop.run(report, folder / CHECKPOINTS, [each.after_step for each in watchers])

    # Prove and write.
    with loop.averaged():
        zero_prior = proof.result(trained.row_norms) if proof is not None else None
    if zero_prior is not None:
        log.info("zero prior: %s", ", ".join(f"{k} {v:.4g}" for k, v in zero_prior.items()))
    if not loop.finite():
        raise Diverged("what was trained holds NaN or infinity; lower learning_rate")
    facts = meta.describe(settings, examples, trained, zero_prior, adapter, validation.curves)
    path = folder / WEIGHTS
    if not loop.processes.is_main_process:
        return path, None
    told = Told(
        facts,
        examples,
        trained.losses,
        validation.curves,
        previews.album.columns,
        previews.thumbnails,
    )
    return path, judge(loop, told, previews.album, path)


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
    few_steps = None if file else find_few_step_lora([Path(wanted).name])
    if few_steps is not None:
        log.warning(
            "turbo_adapter: %s is %s, which adds a distillation; a training adapter removes one. "
            "Train without it and load it when generating",
            *(Path(wanted).name, few_steps.name),
        )
    return TurboAdapter.read(adapter_path(file) if file else Path(wanted).expanduser())


@contextmanager
def _heard_out() -> Iterator[None]:
    """Inside, SIGTERM ends the process as Ctrl-C does, by an exception that lets the loop save.

    Only there: before and after it there is nothing to save, and a library that is interrupted
    within may call it a broken file. A program that has a handler of its own keeps it.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _goes_on_from(folder: Path, resume_from: Path | None) -> bool:
    """Whether what is resumed lies in the folder."""
    return resume_from is not None and resume_from.resolve().is_relative_to(folder.resolve())


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
