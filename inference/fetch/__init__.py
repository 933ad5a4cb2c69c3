"""Finds and downloads weights: paths, URLs and the Hub, with limits and a cache."""

from inference.fetch.download import Downloader, DownloadError, shown
from inference.fetch.sources import (
    SourceError,
    Sources,
    allowed_file,
    data_content,
    is_data,
    named,
    of_input,
)

__all__ = [
    "DownloadError",
    "Downloader",
    "SourceError",
    "Sources",
    "allowed_file",
    "named",
    "of_input",
    "data_content",
    "is_data",
    "shown",
]
