"""Where weights come from: paths, addresses and the Hub, with limits and a cache."""

from inference.fetch.download import Downloader, DownloadError, shown
from inference.fetch.sources import SourceError, Sources, allowed_file, named

__all__ = [
    "DownloadError",
    "Downloader",
    "SourceError",
    "Sources",
    "allowed_file",
    "named",
    "shown",
]
