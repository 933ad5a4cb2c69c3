"""What the front answers: the runtime's replies and webhooks without what is not the customer's."""

import re
from collections.abc import Mapping
from typing import Any

from inference.console import clean_for, texts
from inference.fetch import shown
from serving.fetching import is_address
from serving.openapi import Json

OVER = ("succeeded", "failed", "canceled")
CRASHED = (
    "the process of the model ended unexpectedly, perhaps because it ran out of memory; it is "
    "being started again"
)
# What the runtime puts before an error, at times twice, and the name of our own exception.
_PREFIXES = re.compile(r"^(?:(?:Prediction|Training) failed: )+(?:RequestError: )?")


class Cleaner:
    """Cleans what the runtime says about one request."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._known = texts(body)
        self._addresses = [each for each in self._known if is_address(each)]
        self.files: dict[str, str] = {}  # path of a fetched file: name of its input

    def text(self, text: str) -> str:
        """Logs: without paths, temporary files' names, control characters, and queries."""
        for path, name in self.files.items():
            text = text.replace(path, name)
        for address in self._addresses:
            text = text.replace(address, shown(address))
        return clean_for(text, self._known)

    def error(self, text: str) -> str:
        """Why a request failed, in one line."""
        text = _PREFIXES.sub("", text)
        if text == "Worker crashed":
            return CRASHED
        lines = [line.strip() for line in self.text(text).splitlines() if line.strip()]
        return "; ".join(lines).replace(":; ", ": ")

    def reply(self, reply: Json) -> Json:
        """A reply or a webhook of the runtime."""
        changed: Json = {}
        if isinstance(reply.get("error"), str):
            changed["error"] = self.error(reply["error"])
        if isinstance(reply.get("logs"), str):
            changed["logs"] = self.text(reply["logs"])
        return reply | changed
