"""Finds and downloads weights: paths, URLs and the Hub, with limits and a cache."""

from inference.fetch.disk_cache import DiskCache
from inference.fetch.download import Downloader, DownloadError, shown
from inference.fetch.sources import (
    SourceError,
    Sources,
    allowed_file,
    data_content,
    default_cache,
    is_data,
    named,
    of_input,
)

__all__ = [
    "DiskCache",
    "DownloadError",
    "Downloader",
    "SourceError",
    "Sources",
    "allowed_file",
    "named",
    "of_input",
    "data_content",
    "default_cache",
    "is_data",
    "shown",
]
