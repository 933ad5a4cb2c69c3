"""Forwards the runtime's webhooks to the client's URL, which the runtime does not get.

The runtime sends them to a secret URL of the front on 127.0.0.1. The front forwards them in order,
only to public https addresses, and without $WEBHOOK_AUTH_TOKEN, since a client must not get a key
of the operator.
"""

import asyncio
import http.client
import json
import logging
from collections.abc import Callable

from inference.fetch import Downloader, DownloadError, shown
from serving.fetching import Connections, in_thread
from serving.openapi import Json
from serving.replies import OVER

log = logging.getLogger(__name__)

EVENTS = ("start", "output", "logs", "completed")
ATTEMPTS = 12  # for the last event, as the runtime does; the others are sent once
SECONDS = 30.0  # for one event


class Webhook:
    """The webhook of one request. Events are cleaned by `clean` before they are sent."""

    def __init__(
        self,
        url: str,
        events: list[str] | None,
        downloader: Downloader,
        clean: Callable[[Json], Json],
    ) -> None:
        self.url, self.events = url, events or list(EVENTS)
        self._downloader, self._clean = downloader, clean
        self._waiting: asyncio.Queue[Json] = asyncio.Queue()
        self._ended = False
        self.task = asyncio.create_task(self._send_all())

    def put(self, event: Json) -> None:
        """Queues an event. The first one with a final status is the last one."""
        if self._ended:
            return
        self._ended = event.get("status") in OVER
        self._waiting.put_nowait(event)

    async def _send_all(self) -> None:
        while True:
            event = await self._waiting.get()
            last = event.get("status") in OVER
            if not last and not self._waiting.empty():
                continue  # a newer event contains this one
            if last and "completed" not in self.events:
                return
            await self._send(event, ATTEMPTS if last else 1)
            if last:
                return

    async def _send(self, event: Json, attempts: int) -> None:
        body = await in_thread(lambda: json.dumps(self._clean(event), ensure_ascii=False).encode())
        headers = {"Content-Type": "application/json"}
        reason = ""
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(min(0.2 * 2**attempt, 10))
            try:
                status = await asyncio.wait_for(
                    Connections(self._downloader).do(
                        lambda ours: ours.post(self.url, body, headers)
                    ),
                    SECONDS,
                )
            except DownloadError as error:
                reason = str(error)
                break
            except (OSError, http.client.HTTPException, TimeoutError) as error:
                reason = str(error) or type(error).__name__
                continue
            if status < 300:
                return
            reason = f"the answer was {status}"
            if status < 500 and status not in (408, 425, 429):
                break
        log.warning("webhook %s: %s", shown(self.url), reason)
