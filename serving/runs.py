"""Runs one request: downloads its files, calls the runtime, and cleans the reply.

Like the runtime, the front runs one request at a time.
"""

import asyncio
import json
import logging
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from inference.fetch import Downloader, DownloadError, SourceError
from serving.fetching import fetched, in_thread
from serving.openapi import Json
from serving.replies import CRASHED, OVER, Cleaner
from serving.supervisor import Supervisor
from serving.validation import Inputs, Refused, detail
from serving.webhooks import EVENTS, Webhook

log = logging.getLogger(__name__)

CANCEL_SECONDS = 60.0  # after a cancellation; then the runtime is restarted
BUSY_SECONDS = 10.0  # for the runtime to be free again after the last request
LONGEST_ID = 200  # characters


@dataclass(frozen=True)
class Reply:
    """A reply to the client."""

    status: int
    body: Json


@dataclass(frozen=True)
class Ask:
    """A checked request."""

    id: str
    inputs: Json
    context: Any
    webhook: str | None
    events: list[str] | None

    @classmethod
    def of(cls, body: Json, run_id: str | None, inputs: Inputs) -> "Ask":
        """The request in a body, with the id in its path. Raises `Refused`."""
        given, webhook = body.get("id"), body.get("webhook")
        events = body.get("webhook_events_filter")
        if given is not None and not isinstance(given, str):
            raise Refused(detail(["id"], "must be a string"))
        if run_id is not None and given not in (None, run_id):
            message = "prediction ID must match the ID supplied in the URL"
            raise Refused(detail(["id"], message))
        name = run_id or given or f"pred_{secrets.token_hex(10)}"
        if len(name) > LONGEST_ID or not name.isprintable():
            message = f"must have at most {LONGEST_ID} printable characters"
            raise Refused(detail(["id"], message))
        if webhook is not None and not isinstance(webhook, str):
            raise Refused(detail(["webhook"], "must be an https URL"))
        if events is not None and not (
            isinstance(events, list) and all(each in EVENTS for each in events)
        ):
            message = f"must be a list of {', '.join(EVENTS)}"
            raise Refused(detail(["webhook_events_filter"], message))
        checked = inputs.check(body.get("input", {}))
        return cls(name, checked, body.get("context"), webhook or None, events)


def _encoded(body: Json) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


class Run:
    """A running request. `done` is set when `reply` is final."""

    def __init__(
        self,
        ask: Ask,
        names: frozenset[str],  # inputs that may be URLs
        folder: Path,
        route: str,
        hook: str,  # URL for the runtime's webhooks
        supervisor: Supervisor,
        downloader: Downloader,
    ) -> None:
        self.ask, self._names, self._supervisor = ask, names, supervisor
        self._folder, self._downloader = folder, downloader
        self._hook = hook
        self._path = f"/{route}"
        self.reply = Reply(500, {"error": "the request did not end", "status": "failed"})
        self.done = asyncio.Event()
        self._state: Json = {"logs": "", "metrics": {}, "status": "starting"}
        self._cancelled = self._begun = self._handed_over = False
        self._cleaner = Cleaner(
            {"input": ask.inputs, "id": ask.id, "webhook": ask.webhook, "context": ask.context}
        )
        self.webhook = None
        if ask.webhook:
            self.webhook = Webhook(ask.webhook, ask.events, downloader, self._cleaner.reply)
        self._work = asyncio.create_task(self._serve())
        self._others: set[asyncio.Task[None]] = set()
        self.watcher: asyncio.Task[None] | None = None

    async def _serve(self) -> None:
        self._begun = True
        try:
            self.reply = self._ended("canceled") if self._cancelled else await self._result()
        except asyncio.CancelledError:
            self.reply = self._ended("canceled")
        except (DownloadError, SourceError) as error:
            self.reply = self._ended("failed", str(error))
        except Exception:
            log.exception("the front failed")
            self.reply = self._ended("failed", "internal error; see the server's log")
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self.webhook is not None and not (self._handed_over and self.reply.status == 200):
                # The runtime did not send a last event.
                body = self.reply.body
                over = body.get("status") in OVER
                reason = str(body.get("error") or body.get("detail"))
                self.webhook.put(body if over else self._ended("failed", reason).body)
            self.done.set()

    async def _result(self) -> Reply:
        self._folder.mkdir(mode=0o700)
        inputs = await fetched(self.ask.inputs, self._names, self._folder, self._downloader)
        for name in self._names & inputs.keys():
            values = inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
            self._cleaner.files |= {v: name for v in values if str(v).startswith("/")}
        body: Json = {"id": self.ask.id, "input": inputs, "webhook": self._hook}
        body["webhook_events_filter"] = self.webhook.events if self.webhook else ["logs"]
        if self.ask.context is not None:
            body["context"] = self.ask.context
        content = await in_thread(partial(_encoded, body))
        del inputs, body
        self._handed_over = True
        return await self._ask_runtime(content)

    async def _ask_runtime(self, content: bytes) -> Reply:
        loop = asyncio.get_running_loop()
        until = loop.time() + BUSY_SECONDS
        while True:
            if not self._supervisor.ready:
                self._handed_over = False
                return Reply(503, {"error": self._supervisor.reason, "status": "failed"})
            try:
                answer = await self._supervisor.client.post(
                    self._supervisor.url + self._path,
                    content=content,
                    headers={"Content-Type": "application/json"},
                )
            except httpx.HTTPError:
                self._handed_over = False
                self._supervisor.restart("the model's process ended unexpectedly")
                return (
                    self._ended("canceled") if self._cancelled else self._ended("failed", CRASHED)
                )
            if answer.status_code == 409 and loop.time() < until and not self._cancelled:
                await asyncio.sleep(0.05)  # it accepts requests a moment after its last reply
                continue
            try:
                reply = await in_thread(answer.json)
            except ValueError:  # the runtime's errors for refused requests are plain text
                reply = {"detail": [detail([], self._cleaner.error(answer.text))]}
            if reply.get("error") == "Worker crashed":
                self._supervisor.restart("the model's process ended unexpectedly")
                if self._cancelled:
                    return self._ended("canceled")
            cleaned = await in_thread(partial(self._cleaner.reply, reply))
            return Reply(answer.status_code, cleaned)

    def _ended(self, status: str, error: str | None = None) -> Reply:
        body = self._cleaner.reply(self._state) | {"id": self.ask.id, "status": status}
        if error is not None:
            body["error"] = self._cleaner.error(error)
        return Reply(200, body)

    def event(self, event: Json) -> None:
        """Handles a webhook of the runtime. It is cleaned only when it is sent."""
        kept = ("logs", "metrics", "status")
        self._state = self._state | {key: event[key] for key in kept if key in event}
        if self.webhook is not None:
            self.webhook.put(event)

    def shown(self, inputs: Inputs) -> Json:
        """The current state, for a repeated PUT."""
        state = self._cleaner.reply(self._state)
        return {"id": self.ask.id, "input": inputs.hidden(self.ask.inputs), **state}

    def cancel(self) -> None:
        """Cancels the request, at most once: a second cancellation would interrupt the cleanup."""
        if self._cancelled or self.done.is_set():
            return
        self._cancelled = True
        if not self._handed_over:
            if self._begun:
                self._work.cancel()
            return
        task = asyncio.create_task(self._cancel())
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    async def _cancel(self) -> None:
        path = f"{self._supervisor.url}{self._path}/{quote(self.ask.id, safe='')}/cancel"
        loop = asyncio.get_running_loop()
        until = loop.time() + CANCEL_SECONDS
        accepted = False
        while not self.done.is_set() and loop.time() < until:
            if not accepted:
                with suppress(httpx.HTTPError):
                    answer = await self._supervisor.client.post(path, timeout=10)
                    accepted = answer.status_code == 200  # 404 before it has accepted the request
            with suppress(TimeoutError):
                await asyncio.wait_for(self.done.wait(), 0.1)
        if not self.done.is_set():
            self._supervisor.restart(
                f"a cancelled request did not end within {CANCEL_SECONDS:.0f} seconds"
            )
