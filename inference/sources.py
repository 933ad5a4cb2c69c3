"""From what a request calls its weights to a file on this machine.

https://host/path/file.zip                               a file on the public web
https://huggingface.co/owner/name/resolve/main/file      so on the Hub, https:// may be missing
huggingface.co/owner/name                                the one .safetensors of a repository
hf:owner/name[/file][@revision]                          the same in short
data:application/zip;base64,…                            the file itself
outputs/weights.zip                                      a file on this machine
"""

import base64
import binascii
import logging
import math
import os
import re
import time
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from adapters.archive import Archive
from adapters.lora_header import CONFIG
from inference.disk_cache import DiskCache
from inference.download import Downloader, DownloadError

log = logging.getLogger(__name__)

HUB = "https://huggingface.co"
SPELLINGS = "hf:owner/name/file.safetensors"
FRESH_SECONDS = 600  # a name that was asked this recently is not asked again

_NAME = r"[A-Za-z0-9][\w.-]*"
_SHORT = re.compile(
    rf"hf:(?P<repository>{_NAME}/{_NAME})(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?"
)
_PAGE = re.compile(
    rf"(?:https://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>{_NAME}/{_NAME})"
    r"(?:/(?:resolve|blob|raw|tree)/(?P<revision>[^/]+)(?:/(?P<file>.+))?|/(?P<loose>.+))?"
)


class SourceError(ValueError):
    """Weights by a name that leads nowhere, or must not be followed."""


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the Hub; None: the only .safetensors it has."""

    repository: str  # owner/name
    file: str | None = None
    revision: str = "main"

    @classmethod
    def parse(cls, source: str) -> "HubFile | None":
        """What a source names on the Hub, or None where it names something else."""
        match = _SHORT.fullmatch(source) or _PAGE.fullmatch(source.split("?")[0].rstrip("/"))
        if match is None:
            return None
        found = match.groupdict()
        file = found["file"] or found.get("loose")
        return cls(
            found["repository"],
            unquote(file) if file else None,
            unquote(found["revision"] or "main"),
        )

    @property
    def url(self) -> str:
        """Where the Hub keeps the file."""
        assert self.file is not None
        return f"{HUB}/{self.repository}/resolve/{quote(self.revision, safe='')}/{quote(self.file)}"


def default_cache() -> DiskCache:
    """Downloads of weights, below the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return DiskCache(Path(caches) / "zeroprior" / "weights")


@dataclass(frozen=True)
class Sources:
    """Where weights come from."""

    downloader: Downloader = field(default_factory=Downloader)
    cache: DiskCache = field(default_factory=default_cache)
    # Addresses of adapter_config.json, and when they were asked for.
    _configs: dict[tuple[HubFile, str | None], tuple[float, str | None]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def file(
        self,
        source: str | PathLike[str],
        token: str | None = None,
        local_folder: Path | None = None,
    ) -> Path:
        """The local file of a source.

        `token` opens private repositories of the Hub and is sent nowhere else. With
        `local_folder`, a string may name only files below it, none of them hidden: the string
        may come from a stranger. A path object is trusted. Raises `SourceError` or
        `DownloadError` with the reason.
        """
        if isinstance(source, PathLike):
            return Path(source)
        source = source.strip()
        if source.startswith("data:"):
            with self.cache.part() as part:
                part.write_bytes(_data(source))
                return self.cache.keep("data", part, None)
        hub = HubFile.parse(source)
        if hub is not None:
            return self._downloaded(self._named(hub, token).url, token)
        if "://" in source:
            return self._downloaded(source, None)
        return _local(source, local_folder)

    def config(self, source: str | PathLike[str], token: str | None = None) -> Path | None:
        """PEFT's adapter_config.json beside a file in a repository of the Hub, or None.

        Whether there is one is asked at most every `FRESH_SECONDS`.
        """
        hub = HubFile.parse(source.strip()) if isinstance(source, str) else None
        if hub is None or not (hub.file or ".safetensors").endswith(".safetensors"):
            return None
        asked, url = self._configs.get((hub, token), (-math.inf, None))
        if time.monotonic() - asked > FRESH_SECONDS:
            try:
                file = self._named(hub, token).file or ""
                config = replace(hub, file="".join(file.rpartition("/")[:2]) + CONFIG)
                url = config.url if config.file in self._files(hub, token) else None
            except DownloadError as error:
                log.warning("not known whether %s has %s: %s", hub.repository, CONFIG, error)
                return None
            self._configs[hub, token] = time.monotonic(), url
        return self._downloaded(url, token) if url else None

    def _files(self, hub: HubFile, token: str | None) -> list[str]:
        """Names of the files in a repository."""
        revision = quote(hub.revision, safe="")
        answer = self.downloader.json(
            f"{HUB}/api/models/{hub.repository}/revision/{revision}", token
        )
        return [each["rfilename"] for each in answer.get("siblings", [])]

    def _named(self, hub: HubFile, token: str | None) -> HubFile:
        """The file with its name, which the repository is asked for where it was left out."""
        if hub.file is not None:
            return hub
        files = [name for name in self._files(hub, token) if name.endswith(".safetensors")]
        if len(files) == 1:
            return replace(hub, file=files[0])
        if not files:
            raise SourceError(f"{hub.repository} on the Hub holds no .safetensors")
        shown = ", ".join(files[:8]) + (", …" if files[8:] else "")
        raise SourceError(
            f"{hub.repository} on the Hub holds {len(files)} .safetensors; name one of them, as in "
            f"hf:{hub.repository}/{files[0]} ({shown})"
        )

    def _downloaded(self, url: str, token: str | None) -> Path:
        name = f"{url} {token or ''}"  # what one token opened is found again with that token alone
        entry = self.cache.find(name)
        if entry is not None and time.time() - entry.asked < FRESH_SECONDS:
            return self.cache.use(name, entry)
        with self.cache.part() as part:
            answer = self.downloader.file(url, part, token, entry.etag if entry else None)
            if entry is not None and answer.unchanged:
                return self.cache.use(name, replace(entry, asked=time.time()))
            return self.cache.keep(name, part, answer.etag)


def named(archive: Archive, source: str | PathLike[str]) -> Archive:
    """The archive with the last part of its source's path as one more of its names."""
    path = urlsplit(str(source)).path if "://" in str(source) else str(source)
    name = "" if path.startswith("data:") else unquote(path).rstrip("/").rpartition("/")[2]
    name = name.partition("@")[0]  # hf:owner/name/file@revision
    return (
        archive if name in ("", *archive.names) else replace(archive, names=(*archive.names, name))
    )


def _data(source: str) -> bytes:
    """The content of a data URL."""
    header, comma, content = source.partition(",")
    if not comma or not header.endswith(";base64"):
        raise SourceError(f"{source[:40]!r}… is not a data URL in base64")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise SourceError(f"{source[:40]!r}… is damaged: {error}") from error


def _local(source: str, folder: Path | None) -> Path:
    """A file on this machine, below `folder` where one is given."""
    path = Path(source).expanduser()
    if folder is not None:
        root, path = folder.resolve(), (folder / path).resolve()
        inside = path.is_relative_to(root)
        if not inside or any(part.startswith(".") for part in path.relative_to(root).parts):
            raise SourceError(
                f"{source!r} is outside of the working folder; a request may name files below it, "
                f"https URLs, {SPELLINGS}, or bring the file itself"
            )
    if not path.is_file():
        raise SourceError(f"{source}: no such file; weights are files, https URLs, or {SPELLINGS}")
    return path
