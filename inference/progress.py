"""The progress bar: one at a time; log lines instead if there is no terminal."""

import logging
import sys
from contextlib import suppress
from typing import Any, ClassVar

from tqdm import tqdm

log = logging.getLogger(__name__)

DELAY = 2.0  # seconds after which a short task shows its bar


class Progress(tqdm):
    """A bar on a terminal, unless another one is open. Short tasks have none.

    With `lines`, the bar is shown from the start and left on the screen. Without a terminal there
    are no bars; with `lines`, the first step and each tenth of the task are logged.
    """

    _open: ClassVar[int] = 0

    def __init__(self, *arguments: Any, lines: bool = False, **options: Any) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._lines = lines and not terminal and not options.get("disable")
        if not terminal or Progress._open:
            options["disable"] = True
        delay = 0 if lines else DELAY
        self._counts = False
        with suppress(OSError):
            super().__init__(
                *arguments, **{"leave": lines, "delay": delay, "unit": "step", **options}
            )
        self._name, self._of = options.get("desc"), options.get("total") or 0
        self._done, self._text = options.get("initial", 0), ""
        self._counts = not self.disable
        Progress._open += self._counts

    def update(self, n: float | None = 1) -> bool | None:
        """Counts steps, and logs a line at each tenth."""
        before, self._done = self._done, self._done + int(n or 0)
        if self._lines and self._of:
            if before == 0 or self._done * 10 // self._of > before * 10 // self._of:
                log.info("%s %d/%d%s", self._name, self._done, self._of, self._text)
        return super().update(n)

    def set_postfix(self, *arguments: Any, **values: Any) -> None:
        """Values shown after the bar or in the line."""
        self._text = "".join(f", {k} {v}" for k, v in values.items() if k != "refresh")
        super().set_postfix(*arguments, **values)

    def display(self, *arguments: Any, **options: Any) -> Any:
        """Displays the bar; errors, such as a full disk, are ignored."""
        with suppress(OSError):
            return super().display(*arguments, **options)

    def close(self) -> None:
        """Closes the bar, so that another can be shown."""
        Progress._open -= self._counts
        self._counts = False
        with suppress(OSError):
            super().close()
