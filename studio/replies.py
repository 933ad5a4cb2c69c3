"""Answers of the server: JSON, and errors as JSON."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response


class Problem(Exception):
    """A request that is refused, with the words for the user."""

    def __init__(
        self,
        status: int,
        error: str,
        field: str | None = None,
        what_to_do: str | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(error)
        named = {"error": error, "field": field, "what_to_do": what_to_do, **facts}
        self.status, self.content = status, {k: v for k, v in named.items() if v is not None}


def reply(content: Any, status: int = 200) -> Response:
    """A JSON answer that no cache keeps."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Response(
        text.encode(errors="backslashreplace"),
        status,
        {"Cache-Control": "no-store"},
        media_type="application/json",
    )


async def refused(request: Request, problem: Exception) -> Response:
    """The answer to a request that raised `Problem`."""
    assert isinstance(problem, Problem)
    return reply(problem.content, problem.status)
