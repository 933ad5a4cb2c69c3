"""Resolves the weights or the image in a request to a local file, downloaded if necessary.

https://host/path/file.zip                               a file on the public web
https://huggingface.co/owner/name/resolve/main/file      a file on the Hub; https:// is optional
huggingface.co/owner/name                                the only .safetensors of a repository
hf:owner/name[/file][@revision]                          short form of both
data:application/zip;base64,…                            the file itself
outputs/latest/weights.zip                               a file on this machine
"""

import base64
import binascii
import logging
import math
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from adapters.files.containers import printable
from families.redact import looks_like_address, safe_name
from families.registry import meta_of_full_training
from inference.fetch.disk_cache import DiskCache
from inference.fetch.download import Downloader, DownloadError, checked_url

if TYPE_CHECKING:
    from adapters.archive import Archive  # it imports PyTorch

log = logging.getLogger(__name__)

HUB = "https://huggingface.co"
SPELLINGS = "hf:owner/name/file.safetensors"
FRESH_SECONDS = 600  # a cached name is not revalidated within this time
MOST_CONFIGS = 1000  # repositories whose adapter_config.json, or lack of one, is cached
FOLDERS = "ZEROPRIOR_FILES"  # environment variable: the folders whose files a request may name

_NAME = r"[A-Za-z0-9][\w.-]*"
_SHORT = re.compile(
    rf"hf:(?P<repository>{_NAME}/{_NAME})(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?"
)
_PAGE = re.compile(
    rf"(?:https://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repository>{_NAME}/{_NAME})"
    r"(?:/(?:resolve|blob|raw|tree)/(?P<revision>[^/]+)(?:/(?P<file>.+))?|/(?P<loose>.+))?"
)


class SourceError(ValueError):
    """A file that was not found, or that a request may not name."""


@contextmanager
def of_input(name: str) -> Iterator[None]:
    """Sets `zeroprior_input` of a ValueError within the context to the input's name."""
    try:
        yield
    except ValueError as error:
        error.zeroprior_input = name  # type: ignore[attr-defined]
        raise


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the Hub."""

    repository: str  # owner/name
    file: str | None = None  # None: the only .safetensors in it
    revision: str = "main"

    @classmethod
    def parse(cls, source: str) -> "HubFile | None":
        """Parses a source; None if it is not a file on the Hub."""
        source = re.split("[?#]", source)[0].rstrip("/")
        match = _SHORT.fullmatch(source) or _PAGE.fullmatch(source)
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
        """The URL of the file."""
        assert self.file is not None
        path = quote(self.file, errors="replace")
        return f"{HUB}/{self.repository}/resolve/{_quoted(self.revision)}/{path}"


def default_cache() -> DiskCache:
    """Downloads of weights, below the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return DiskCache(Path(caches) / "zeroprior" / "weights")


def allowed_file(text: str) -> Path:
    """The file that a request may name: one below the folders in `$ZEROPRIOR_FILES`.

    The variable lists folders, separated as in `$PATH`. It is empty by default: then no file is
    allowed. A relative name is searched in each folder, then in the working directory. Links out of
    the folders, hidden files and folders, and anything but regular files are refused. Raises
    `SourceError`; its message does not reveal whether the file exists.
    """
    for folder in os.environ.get(FOLDERS, "").split(os.pathsep):
        for named in (text, os.path.abspath(text)) if folder and text and "\0" not in text else ():
            file = _below(Path(folder), named)
            if file is not None:
                return file
    raise SourceError(
        f"'{_shown(text)}' is not a file that a request may name; send the file itself, an https "
        f"URL or {SPELLINGS} (the operator can allow folders of the server with {FOLDERS})"
        f"{_forgotten(text)}"
    )


def _below(folder: Path, text: str) -> Path | None:
    """The regular, visible file of that name below the folder, links resolved, or None."""
    try:
        folder = folder.expanduser().absolute()
        root, named = folder.resolve(strict=True), folder / text
        start = folder if named.is_relative_to(folder) else root
        file = named.resolve(strict=True)
        parts = named.relative_to(start).parts + file.relative_to(root).parts
        if any(part.startswith(".") for part in parts):  # hidden, or ..
            return None
        return file if stat.S_ISREG(file.stat().st_mode) else None
    except (OSError, ValueError, RuntimeError):  # not found, not below, invalid name, link loop
        return None


@dataclass(frozen=True)
class Sources:
    """Finds files on this machine, on the web and on the Hub."""

    downloader: Downloader = field(default_factory=Downloader)
    cache: DiskCache = field(default_factory=default_cache)
    # URLs of adapter_config.json, and when the Hub was asked.
    _configs: dict[tuple[HubFile, str | None], tuple[float, str | None]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def file(
        self, source: str | PathLike[str], token: str | None = None, any_file: bool = True
    ) -> Path:
        """The local file of a source, downloaded if necessary.

        `token` is for private repositories of the Hub and is sent nowhere else. Without `any_file`,
        for untrusted users, a string may only name files that `allowed_file` allows. A path object
        is trusted. Raises `SourceError` or `DownloadError` with the reason.
        """
        if isinstance(source, PathLike):
            return Path(source)
        source = source.strip()
        if is_data(source):
            content = data_content(source)
            with self.cache.part() as part:
                part.write_bytes(content)
                return self.cache.keep(None, part, None)
        hub = HubFile.parse(source)
        if hub is not None:
            return self._downloaded(self._named(hub, token).url, token)
        if "://" in source:
            return self._downloaded(source, None)
        return _local(source) if any_file else allowed_file(source)

    def config(self, source: str | PathLike[str], token: str | None = None) -> Path | None:
        """PEFT's adapter_config.json next to a file in a repository of the Hub, or None.

        Whether there is one is cached for `FRESH_SECONDS`.
        """
        from adapters.formats import CONFIG, MAX_CONFIG_BYTES  # imports PyTorch

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
                log.warning("could not check whether %s has %s: %s", hub.repository, CONFIG, error)
                return None
            if len(self._configs) >= MOST_CONFIGS:
                self._configs.clear()
            self._configs[hub, token] = time.monotonic(), url
        return self._downloaded(url, token, MAX_CONFIG_BYTES) if url else None

    def _files(self, hub: HubFile, token: str | None) -> list[str]:
        """Names of the files in a repository."""
        address = f"{HUB}/api/models/{hub.repository}/revision/{_quoted(hub.revision)}"
        return _file_names(self.downloader.json(address, token))

    def _named(self, hub: HubFile, token: str | None) -> HubFile:
        """The file with its name; without one, the repository's only .safetensors."""
        if hub.file is not None:
            return hub
        files = [name for name in self._files(hub, token) if name.endswith(".safetensors")]
        if len(files) == 1:
            return replace(hub, file=files[0])
        if not files:
            raise SourceError(f"{hub.repository} on the Hub has no .safetensors file")
        first = [printable(name[:100]) for name in files[:8]]
        raise SourceError(
            f"{hub.repository} on the Hub has {len(files)} .safetensors files; name one of them, "
            f"for example hf:{hub.repository}/{first[0]} "
            f"({', '.join(first)}{', …' if files[8:] else ''})"
        )

    def _downloaded(self, url: str, token: str | None, most: int | None = None) -> Path:
        """The local file of a URL, of at most `most` bytes (default: the downloader's limit)."""
        checked_url(url)
        name = f"{url} {token or ''}"  # a private file is in the cache only for its token
        entry = self.cache.find(name)
        if entry is not None and time.time() - entry.asked < FRESH_SECONDS:
            kept = self.cache.use(name, entry)
            if kept is not None:
                return kept
        with self.cache.part() as part:
            answer = self.downloader.file(url, part, token, entry.etag if entry else None, most)
            if entry is not None and answer.unchanged:
                kept = self.cache.use(name, replace(entry, asked=time.time()))
                if kept is not None:
                    return kept
                # Removed by another process.
                answer = self.downloader.file(url, part, token, None, most)
            return self.cache.keep(name, part, answer.etag)


def _shown(source: str) -> str:
    return printable(safe_name(source)[:200])


def _forgotten(source: str) -> str:
    """A hint if a text that is not a file looks like a URL without https://."""
    if not looks_like_address(source):
        return ""
    return "; a URL must begin with https://"


def _quoted(revision: str) -> str:
    return quote(revision, safe="", errors="replace")


def _file_names(answer: object) -> list[str]:
    """The file names in the Hub's answer about a repository."""
    siblings = answer.get("siblings") if isinstance(answer, dict) else None
    entries = siblings if isinstance(siblings, list) else []
    names = [entry.get("rfilename") for entry in entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]


def named(archive: "Archive", source: str | PathLike[str]) -> "Archive":
    """The archive with the last part of its source's path added to its names."""
    text = str(source).strip()
    if is_data(text):
        return archive
    path = urlsplit(text).path if "://" in text else text
    name = unquote(path).rstrip("/").rpartition("/")[2]
    name = name.partition("@")[0][:200]  # hf:owner/name/file@revision
    if name in ("", *archive.names):
        return archive
    return replace(archive, names=(*archive.names, name))


def is_data(text: str) -> bool:
    """Whether a text is a data URL, which contains the file."""
    return text[:5].lower() == "data:"


def data_content(source: str) -> bytes:
    """The content of a data URL. Raises `SourceError`."""
    header, comma, content = source.partition(",")
    shown = printable(source[:40])
    if not comma or not header.lower().endswith(";base64"):
        raise SourceError(f"'{shown}…' is not a data URL in base64")
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        reason = "it is damaged" if isinstance(error, binascii.Error) else "it is not base64"
        raise SourceError(f"'{shown}…' cannot be read: {reason}; send it again") from error


def _local(source: str) -> Path:
    """A file on this machine, named by a trusted user; or the folder of a full training, or of a
    LoRA."""
    try:
        path = Path(source).expanduser()
        if meta_of_full_training(path) is not None:
            return path
        found, folder = path.is_file(), path.is_dir()
        results = [path / name for name in ("weights.zip", "model")]  # in a run's folder
        result = next((each for each in results if folder and each.exists()), None)
        if folder and result is None and any(path.glob("*.safetensors")):  # a LoRA's
            return path
    except (OSError, ValueError, RuntimeError):  # too long, or "~" of an unknown user
        found, folder, result = False, False, None
    if folder:
        hint = f"did you mean {_shown(str(result))}?" if result else "pass a file"
        raise SourceError(f"{_shown(source)} is a folder; {hint}")
    if not found:
        raise SourceError(
            f"{_shown(source)}: no such file; pass a file, an https URL, or {SPELLINGS}"
            f"{_forgotten(source)}"
        )
    return path
