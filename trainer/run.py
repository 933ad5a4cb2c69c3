"""One training run from settings to weights.zip: all its steps, in order."""

import logging
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.full_weights import FullWeights, trained_names
from adapters.lora import Lora
from adapters.placeholder import Placeholder
from adapters.placeholder_token import check_token
from families.components import original_transformer
from families.loading import default_device
from families.no_gpu import why_too_slow
from families.recomputation import recompute
from inference import acceleration
from inference.input_fields import check_length
from inference.inputs import SECRET_LENGTH
from inference.prompts import prompts_of
from inference.secret import GivenSecret
from trainer.data import log_checks
from trainer.learning import (
    Captions,
    Checkpoint,
    Control,
    Loop,
    Preservation,
    Report,
    Saver,
    ZeroPriorProof,
    by_main,
    check_launch,
    check_texts,
    continue_weights,
    data_identity,
    edits_of,
    encode_images,
    encode_regularization,
    find_turbo_adapter,
    load_best,
    lost_processes_named,
    preservation_prompts,
    processes,
    read_resume,
    same_for_all,
    stopped_by_signals,
    transformer_with,
    uncropped_of,
    warn_repeats,
    with_seed,
)
from trainer.memory import RanOut, TooLarge, fit, free_memory, memory_freed, running_out
from trainer.monitor import (
    Previews,
    Trackers,
    TrackerUpdates,
    Validation,
    check_trackers,
    hold_out,
    preview_requests,
    previews_while_training,
    prompt_features,
    split,
    weights_for_inference,
    with_default_previews,
)
from trainer.outputs import Run, open_run
from trainer.reading import family_and_targets, read_examples, with_pairs, with_steps
from trainer.recording import emit_done, introduce, recorded
from trainer.result import (
    BROKEN,
    DatasetFile,
    Outcome,
    TrainingRecord,
    Verdict,
    check_model,
    check_repository,
    describe_next_steps,
    describe_run,
    drift_prompts,
    evaluate,
    keep_weights_on_error,
    publish,
    withhold,
    write_weights,
)
from trainer.settings import (
    Secret,
    Secrets,
    Settings,
    SettingsError,
    TrainingInputs,
    hidden,
    missing_here,
    resolve,
    too_much,
)

log = logging.getLogger(__name__)


def train_from_inputs(
    inputs: TrainingInputs,
    report: Report | None = None,
    *,
    served: bool = False,
    wandb_api_key: GivenSecret = None,
    hf_token: GivenSecret = None,
) -> Path:
    """Trains with the inputs of train.py.

    `served`: the run is a server's request. It always gets a new folder, old runs of the server
    are removed (`trainer.outputs`), and only the request's own keys are used.
    """
    secrets = Secrets(Secret.of(wandb_api_key), Secret.of(hf_token), from_request=served)
    for name, key in (("wandb_api_key", secrets.wandb_api_key), ("hf_token", secrets.hf_token)):
        check_length(name, key.reveal() if key is not None else "", SECRET_LENGTH)
    return train(resolve(inputs), report, secrets)


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    weights: Path  # weights.zip
    verdict: Verdict | None  # of its checks; set only in the main process


def train(settings: Settings, report: Report | None = None, secrets: Secrets | None = None) -> Path:
    """Trains and returns the path of weights.zip, also if a check fails (`train_and_check`)."""
    return train_and_check(settings, report, secrets).weights


@memory_freed()
def train_and_check(
    settings: Settings, report: Report | None = None, secrets: Secrets | None = None
) -> Result:
    """Trains, writes weights.zip atomically, and checks it.

    Settings, data and accounts are checked before a model is loaded. If the GPU runs out of memory,
    the run is retried once in the next mode, which needs less memory; `TooLarge` is raised if that
    fails, too. Raises `FolderRefused` if the run's folder contains another run or is in use by
    another process, and `Stopped` if a command ends the run.
    """
    secrets = secrets or Secrets()
    if secrets.from_request and (costs := too_much(settings)):
        raise SettingsError("; ".join(costs))
    if slow := why_too_slow(settings.base):
        log.warning("%s", slow)
    if lacking := missing_here(settings):
        raise SettingsError("; ".join(lacking))
    check_trackers(settings.trackers, secrets)
    if settings.hf_repo_id:
        check_repository(settings.hf_repo_id, secrets.hf_token, secrets.from_request)
    check_launch(settings)
    settings = with_seed(settings)
    settings = settings.replace(seed=same_for_all(settings.seed))
    if default_device().type != "cpu":
        free_memory()  # of earlier runs, before the free memory is measured
    where = settings.dataset, settings.output_dir, settings.resume_from, settings.name
    with by_main(lambda: open_run(*where, served=secrets.from_request)) as run:
        with recorded(run, settings, secrets) as control:
            return _train_in(run, settings, report, secrets, control)


def _train_in(
    run: Run, settings: Settings, report: Report | None, secrets: Secrets, control: Control
) -> Result:
    """Trains in the run's locked folder."""
    tried: list[str] = []
    found: Verdict | None = None
    while True:
        try:
            with ExitStack() as until_written:
                path, outcome = _train(settings, report, secrets, until_written, run, control)
                if outcome is not None:  # the training's memory is free by now
                    run.complete()
                    run.events.phase("checking")
                    found = evaluate(outcome)
            break
        except RanOut as short:
            tried.append(str(short.mode))
            if short.leaner is None or len(tried) > 1 or processes().num_processes > 1:
                raise TooLarge(
                    f"out of memory, tried with: {'; '.join(tried)}. Lower resolution, batch_size "
                    "or rank, leave quantize and low_memory on auto, or use a larger GPU"
                ) from short.__cause__
            settings = short.leaner
        free_memory()  # here, where no frame of the first attempt is left
        log.warning("retrying in the next mode, which needs less memory")
    try:  # the weights are written; a later error must not lose them
        processes().wait_for_everyone()
        if outcome is not None and settings.hf_repo_id:
            if found is None or found.result != BROKEN or settings.allow_failed_checks:
                publish(path, settings.hf_repo_id, secrets.hf_token, secrets.from_request)
            else:
                withhold(path, settings.hf_repo_id, secrets.from_request)
        if outcome is not None:
            subject = " and ".join(settings.tokens) or settings.trigger_word
            first = outcome.examples[0]
            instruction = first.caption if first.controls else ""
            log.info("%s", describe_next_steps(path, subject, settings.base, instruction))
    except Exception as error:
        said = hidden(f"{type(error).__name__}: {error}", secrets.hf_token, secrets.wandb_api_key)
        log.warning("%s is complete, but a later step failed (%s)", path, said)
    if outcome is not None and found is not None:
        files = [each for each in (path, run.report) if each.exists()]
        emit_done(control, found, files, outcome.record)
    return Result(path, found)


@lost_processes_named()
def _train(
    settings: Settings,
    report: Report | None,
    secrets: Secrets,
    until_written: ExitStack,
    run: Run,
    control: Control,
) -> tuple[Path, Outcome | None]:
    """The path of the weights and, in the main process, what the checks need."""
    # Check what needs no model.
    file = DatasetFile(settings.dataset)
    examples, regularized = read_examples(settings, run, control, secrets.from_request)
    pairs = [each for each in examples if each.controls]  # all or none
    dataset = file.describe(examples, regularized := [] if pairs else regularized)
    settings = with_steps(with_pairs(settings, examples), examples)
    log_checks(examples, settings)
    held_out_names = hold_out(examples, settings)
    settings = with_default_previews(settings, [each.caption for each in examples], pairs)
    resume = read_resume(settings, [*examples, *regularized])
    adapter = find_turbo_adapter(settings)
    run.describe(describe_run(settings, examples, dataset, secrets.from_request))
    trackers = until_written.enter_context(
        Trackers(settings, run.folder, secrets.wandb_api_key, secrets.from_request)
    )
    family, targets = family_and_targets(settings)
    for token in settings.tokens:
        check_token(token, family.prompts)
    prompts = [prompts_of(each) for each in preview_requests(settings, family)]
    check_texts(examples, prompts, family, settings)
    introduce(settings, examples, family)
    control.phase("loading")
    texts = [text for example in examples for text in example.captions]
    memory = fit(settings, family, texts)
    run.events.emit("plan", mode=str(memory.mode), peak_bytes=memory.peak or None, fits=memory.fits)
    family.set_storage(memory.storage)
    path = run.model if settings.full else run.weights
    step_weights = not (secrets.from_request or settings.full)
    saver = Saver(run.checkpoints, path, step_weights)
    until_written.callback(saver.release)
    where = family.dtype, family.device, memory.mode, saver
    until_written.enter_context(running_out(settings, *where))

    # Encode once.
    kept = encode_regularization(family, regularized, settings)
    samples = encode_images(family, examples, settings, control.phase)
    start = family.text_width, settings.placeholder_init_std
    placeholders = [
        Placeholder.create(token, *start, settings.seed + number, family.device)
        for number, token in enumerate(settings.tokens)
    ]
    proof = ZeroPriorProof(family, placeholders) if placeholders else None
    if proof is not None:
        for known in zip(settings.tokens, proof.token_ids, proof.norms_start, strict=True):
            log.info("%s is token %d, norm %.3g at the start", *known)
    vectors = {each.token: each.vectors for each in placeholders}
    references = uncropped_of(samples)
    preview_texts = prompt_features(settings, family, references)
    trained_on, held_out = split(samples, held_out_names)
    preserved = preservation_prompts(settings, kept, trained_on)
    measured = drift_prompts(settings)
    if pairs:
        edits = edits_of([*trained_on, *held_out], measured, family, settings.caption_dropout)
        edits += preserved.edits
        captions = Captions(family, (), vectors, preserved.all, control.phase, edits)
    else:
        captions = Captions(family, texts, vectors, [*measured, *preserved.all], control.phase)
    warn_repeats(trained_on, settings.batch_size * processes().num_processes, family.vae_factor)

    # Train.
    control.phase("loading")
    second_base = memory.mode.second_base
    previewed = by_main(
        lambda: not memory.no_previews and previews_while_training(settings, second_base)
    )
    copies = bool(settings.sample_prompts) and previewed
    inference_weights = weights_for_inference(family, settings.full, second_base, adapter, copies)
    transformer = transformer_with(adapter, family)
    recompute(family, memory.mode.checkpointing)
    preservation = None
    left = not isinstance(resume, Checkpoint) or resume.step < settings.steps
    if preserved and left:
        preservation = Preservation(family, settings, captions, preserved, control)
    weights: Lora | FullWeights
    if settings.full:
        weights = FullWeights(family, trained_names(family, settings.lora_targets))
        log.info("full training of %d layers, %.3g values", len(weights.layers()), weights.values())
    else:
        changed = adapter is not None or memory.mode.quantize != "none"
        original = original_transformer(family) if changed and settings.form.needs_base else None
        weights = Lora(transformer, targets, settings.form, settings.seed, original)
        log.info("%s on %d layers", settings.form, len(weights.layers))
    if acceleration.wanted_in_training(family.device) and not family.storage.shard:
        log.info("compiling; the first steps take longer")
        captions.compile()
        if not memory.mode.offload:
            sizes = {each.shapes for each in samples}
            acceleration.compile_blocks(transformer, several_sizes=len(sizes) > 1)
    data = data_identity([*examples, *regularized])
    parts = trained_on, captions, weights, placeholders, data, control, preservation
    loop = Loop(family, settings, *parts)
    if isinstance(resume, Checkpoint):
        loop.restore(resume)
    elif resume is not None and loop.lora is not None:
        continue_weights(resume, loop.lora, placeholders)
    if loop.done < run.events.step or loop.done:  # later events are void
        run.events.emit("resumed", step=loop.done)
    validation = Validation(loop, held_out)
    place = run.folder, preview_texts, previewed, run.events, references, pairs
    previews = Previews(family, settings, inference_weights, *place)
    tracker_updates = TrackerUpdates(trackers, validation.curves, previews.preview_images)
    until_written.callback(tracker_updates.finish)  # preview images of the final weights
    watchers: list[Validation | Previews | TrackerUpdates] = [validation]  # in all processes
    main, together = loop.processes.is_main_process, family.storage.shard
    watchers += [*[previews] * (main or together), *[tracker_updates] * main]
    control.preview = previews.now
    for each in watchers:
        each.begin(loop)
    with stopped_by_signals(loop):
        trained = loop.run(report, saver, [each.after_step for each in watchers])

    # Verify and write. The checkpoint of the last step exists by now.
    outcomes = []
    with keep_weights_on_error(loop, path, saver) if main else nullcontext():
        curves = replace(validation.curves, shipped=load_best(loop))
        with loop.averaged():
            zero_priors = proof.results(trained.row_norms) if proof is not None else []
        for token, found in zip(settings.tokens, zero_priors, strict=True):
            of = f" of {token}" if len(placeholders) > 1 else ""
            log.info("zero prior%s: %s", of, ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        facts = loop.settings, dataset, trained, zero_priors, adapter, curves
        written = loop, TrainingRecord.of(*facts), examples, previews.preview_images, path, saver
        by_main(lambda: outcomes.append(write_weights(*written)))
        checks = check_model(loop, curves, examples) if main or together else []
    if not main:
        return path, None
    [outcome] = outcomes
    record = replace(outcome.record, checks=[*outcome.record.checks, *checks])
    return path, replace(outcome, record=record, family=inference_weights.restored(loop.lora))
