"""Plans of runs: memory, time and disk space, before anything starts.

PyTorch is in a process of its own (`studio.planner_process`), which stays, and is started again if
it ends.
"""

import asyncio
import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from families.registry import BASES
from families.tokens import SUBJECT, mentions
from inference.input_fields import parts_of
from studio import gpu
from studio.dataset_files import (
    contents_of,
    find,
    member_name,
    place_of,
    texts_of,
)
from studio.folder import Studio
from studio.jobs import Jobs, jobs_of
from studio.new_runs import OFFERED, checked_datasets, checked_settings, refused
from studio.replies import Problem, read_json, reply
from studio.worker import Worker, WorkerEnded
from trainer.data import choose_captions, roles_of
from trainer.events import as_json
from trainer.settings import (
    TRIGGER_MARK,
    Settings,
    SettingsError,
    for_pairs,
    missing_for_optimizer,
)

KEPT = 500  # answers
SECONDS = 120.0  # for one answer, with the start of the process
_tasks: set[asyncio.Task[None]] = set()  # asyncio keeps only weak references


class Planner:
    """Asks the planner's process, and keeps its answers."""

    def __init__(self, studio: Studio) -> None:
        self.worker = Worker("studio.planner_process", studio.folder)
        self._answers: OrderedDict[str, dict[str, Any]] = OrderedDict()

    async def warm(self) -> None:
        """Starts the process, so that the first plan does not wait for it."""
        with suppress(Problem):
            await self.ask(do="tokens", base=next(iter(BASES)), texts=[], token=None)

    async def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; asks again once if the process ends. Raises `Problem` 503."""
        text, key = _text_and_key(request)
        if key in self._answers:
            self._answers.move_to_end(key)
            return self._answers[key]
        for attempt in range(2):
            try:
                answer = await self.worker.ask(json.loads(text), timeout=SECONDS)
                break
            except (WorkerEnded, TimeoutError) as error:
                if attempt:
                    raise Problem(503, f"the planner has failed: {error}") from None
        self._answers[key] = answer
        while len(self._answers) > KEPT:
            self._answers.popitem(last=False)
        return answer

    def known(self, **request: Any) -> dict[str, Any] | None:
        """The answer to a request that was asked before."""
        return self._answers.get(_text_and_key(request)[1])


def _text_and_key(request: Mapping[str, Any]) -> tuple[str, str]:
    text = json.dumps(request, sort_keys=True, default=str)
    return text, hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def planner_of(studio: Studio) -> Planner:
    """The studio's planner."""
    jobs = jobs_of(studio)
    if jobs.planner is None:
        jobs.planner = Planner(studio)
    return jobs.planner


def warm(studio: Studio) -> None:
    """Starts the planner's process, before the first plan is asked for."""
    planner = planner_of(studio)
    if not planner.worker.runs:
        task = asyncio.get_running_loop().create_task(planner.warm())
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)


async def work(studio: Studio) -> None:
    """Ends the planner's process with the server."""
    try:
        # The server waits for requests, and these for the process.
        while not studio.ending.is_set():
            await asyncio.sleep(0.1)
    finally:
        await planner_of(studio).worker.stop(for_good=True)


async def _plan(request: Request) -> Response:
    """POST /api/plan."""
    studio, body = request.app.state.studio, await read_json(request)
    settings = checked_settings(studio, body.get("settings") or {}, body.get("datasets"))
    chosen = checked_datasets(studio, body.get("datasets"))
    images, controls, warnings = await asyncio.to_thread(look_at, studio, chosen, settings)
    if not images:
        raise Problem(422, "the dataset contains no images", "dataset")
    try:
        settings = for_pairs(settings, controls) if controls else settings
    except SettingsError as error:
        raise refused(error) from None
    answer = await planner_of(studio).ask(**_question(settings, images, controls))
    refuse_missing(settings, answer)
    jobs, steps = jobs_of(studio), answer["steps"]
    used = settings.for_images(images)
    each = answer["seconds_per_step"] or _measured(jobs, used)
    free = shutil.disk_usage(studio.folder).free
    warnings = [*answer["warnings"], *warnings]
    if free < answer["disk_bytes"]:
        need = f"the run needs {answer['disk_bytes'] / 1e9:.1f} GB of disk space"
        warnings.insert(0, {"text": f"{need}; {free / 1e9:.1f} GB are free"})
    shown = used.model_dump(exclude={"base", "given"}) | {"base_model": used.base.name}
    return reply(
        answer
        | {
            "images": images,
            "control_images": controls,
            "seconds_per_step": each,
            "seconds": None if each is None else round(steps * each, 1),
            "disk_free": free,
            "settings": as_json({k: v for k, v in shown.items() if k in OFFERED}),
            "warnings": warnings,
        }
    )


def _question(settings: Settings, images: int, controls: int) -> dict[str, Any]:
    given = as_json(settings.given.model_dump(exclude_unset=True, exclude={"dataset"}))
    given |= {"dataset": "dataset", "seed": 0}
    return {"do": "plan", "settings": given, "images": images, "controls": controls}


async def check_known(
    studio: Studio, settings: Settings, chosen: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses what needs a model to be found, if a plan of these settings has found it.

    Raises `Problem` 422. The page plans before it queues a run; without a plan, the run finds it.
    """
    if lacking := missing_for_optimizer(settings.optimizer, gpu.gpu() is not None):
        raise Problem(422, "; ".join(lacking), "optimizer")
    images, controls, _ = await asyncio.to_thread(look_at, studio, chosen, settings)
    answer = planner_of(studio).known(**_question(settings, images, controls))
    if answer is not None:
        refuse_missing(settings, answer)


def refuse_missing(settings: Settings, answer: Mapping[str, Any]) -> None:
    """Raises `Problem` 422 if the planner has found that the settings cannot be used."""
    if "error" in answer:
        raise Problem(422, answer["error"], "lora_targets" if "lora" in answer["error"] else None)
    if lacking := answer.get("missing"):
        field = "optimizer" if "optimizer" in lacking[0] else "quantize"
        raise Problem(422, "; ".join(lacking), field)


def look_at(
    studio: Studio, chosen: Sequence[Mapping[str, Any]], settings: Settings
) -> tuple[int, int, list[dict[str, Any]]]:
    """The number of training images, the most control images of one, and warnings about captions.

    Reads no image.
    """
    count, controls, warnings = 0, 0, list[dict[str, Any]]()
    edits, folders = settings.base.most_references > 0, parts_of(settings.given.controls, ",")
    for each in chosen:
        root = place_of(studio, each["name"])
        files = find(root)
        contents = contents_of(root, files, texts_of(root, files))
        contents = {member_name(name, folders): data for name, data in contents.items()}
        roles = roles_of(contents, editing=edits)
        images = roles.trained
        count += len(images)
        controls = max(controls, roles.controls * edits)
        captions = choose_captions(contents, images, roles.besides).of
        token = each["token"] or settings.subject or settings.trigger_word
        without = [
            name for name in images if token and not _names(captions[name].text, token, settings)
        ]
        if without and settings.train_placeholder_token:
            text = f"{len(without)} of {len(images)} captions do not contain {SUBJECT} or {token}"
            warnings.append({"text": text, "dataset": each["name"], "image": without[0]})
    return count, controls, warnings


def _names(caption: str, token: str, settings: Settings) -> bool:
    """Whether a caption contains the token."""
    text = (
        f"{settings.caption_prefix}{caption or settings.default_caption}{settings.caption_suffix}"
    )
    text = text.replace(TRIGGER_MARK, SUBJECT)
    return mentions(text, SUBJECT) or mentions(text, token)


def _measured(jobs: Jobs, settings: Settings) -> float | None:
    """The time of a step in the newest run of the same base model and size."""
    from trainer.run_files import record_of

    for summary in jobs.runs.all()[:100]:
        seconds = summary["seconds_per_step"]
        if seconds is None or summary["base_model"] != settings.base.name:
            continue
        record = record_of(jobs.studio.outputs / summary["id"])
        used = (record.get("settings") or {}).get("used") or {}
        same = ("batch_size", "gradient_accumulation", "rank")
        if used.get("resolutions") == list(settings.resolutions):
            if all(used.get(name) == getattr(settings, name) for name in same):
                return float(seconds)
    return None


async def _tokens(request: Request) -> Response:
    """POST /api/tokens: the number of tokens of texts, as the base model reads them."""
    body = await read_json(request)
    base, texts = body.get("base"), body.get("texts")
    if not isinstance(base, str) or base not in BASES:
        raise Problem(400, "base must be a known base model", "base")
    if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
        raise Problem(400, "texts must be a list of texts", "texts")
    token = body.get("token")
    if token is not None and not isinstance(token, str):
        raise Problem(400, "token must be a text", "token")
    planner = planner_of(request.app.state.studio)
    answer = await planner.ask(do="tokens", base=base, texts=texts, token=token)
    return reply({name: answer.get(name) for name in ("tokens", "lost", "most")})


ROUTES = [
    Route("/api/plan", _plan, methods=["POST"]),
    Route("/api/tokens", _tokens, methods=["POST"]),
]
