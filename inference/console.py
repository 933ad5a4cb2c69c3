"""What the log looks like to a person: information plain, anything worse by its name."""

import logging
import sys


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def log_to_console() -> None:
    """Sends the log to standard output, unless the program has set it up already."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
