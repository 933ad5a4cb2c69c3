"""Removes private details of the server from the runtime's replies and webhooks."""

import re
from collections.abc import Mapping
from typing import Any

from inference.console import clean_for, texts
from inference.fetch import shown
from serving.fetching import is_address
from serving.openapi import Json

OVER = ("succeeded", "failed", "canceled")
CRASHED = "the model's process ended unexpectedly, possibly out of memory; it is being restarted"
# Prefixes of the runtime before an error, sometimes twice, and the name of our exception.
_PREFIXES = re.compile(r"^(?:(?:Prediction|Training) failed: )+(?:RequestError: )?")


class Cleaner:
    """Cleans the runtime's output for one request."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._known = texts(body)
        self._addresses = [each for each in self._known if is_address(each)]
        self.files: dict[str, str] = {}  # path of a downloaded file: name of its input

    def text(self, text: str) -> str:
        """Logs without paths, names of temporary files, control characters, and URL queries."""
        for path, name in self.files.items():
            text = text.replace(path, name)
        for address in self._addresses:
            text = text.replace(address, shown(address))
        return clean_for(text, self._known)

    def error(self, text: str) -> str:
        """The reason of a failure on one line."""
        text = _PREFIXES.sub("", text)
        if text == "Worker crashed":
            return CRASHED
        lines = [line.strip() for line in self.text(text).splitlines() if line.strip()]
        return "; ".join(lines).replace(":; ", ": ")

    def reply(self, reply: Json) -> Json:
        """A cleaned reply or webhook of the runtime."""
        changed: Json = {}
        if isinstance(reply.get("error"), str):
            changed["error"] = self.error(reply["error"])
        if isinstance(reply.get("logs"), str):
            changed["logs"] = self.text(reply["logs"])
        return reply | changed
