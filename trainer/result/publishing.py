"""Uploads the result of a run to a model repository on the Hub.

Token and permissions are checked before training starts. An upload that fails at the end is a
warning with the command to repeat it, since the weights are on disk.
"""

import json
import logging
import os
import shlex
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, close_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from adapters import archive
from trainer.monitor import FOLDER as SAMPLES
from trainer.result.meta import tokens_in
from trainer.result.model_card import LORA, WEIGHTS, model_card, placeholder_file
from trainer.result.report import NAME as REPORT
from trainer.run_files import UPLOAD
from trainer.settings import Secret, SettingsError, hidden

log = logging.getLogger(__name__)


def check_repository(
    repo_id: str, hf_token: Secret | None = None, from_request: bool = False
) -> None:
    """Raises `SettingsError` if the upload at the end cannot succeed.

    Asks the Hub for the token's user and permissions. If the Hub cannot be reached, logs a warning:
    it may be available at the end of the run. With `from_request` only the request's token is used,
    never one of the server's operator.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SettingsError(f"hf_repo_id: {error}") from error
    if repo_id.count("/") != 1:
        raise SettingsError(f"hf_repo_id is {repo_id!r}; write it as OWNER/NAME")
    token = _token(hf_token, from_request)
    try:
        with _separate_session(from_request):
            user = HfApi(token=token.reveal()).whoami()
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise SettingsError(
                "hf_token is rejected by the Hub; create a new one with write access at "
                "https://huggingface.co/settings/tokens"
            ) from None
        log.warning("the Hub could not check hf_token (%s)", hidden(error, token))
        return
    except Exception as error:  # no network, a proxy's page, …
        log.warning(
            "the Hub cannot be reached (%s); the upload to %s is still tried at the end",
            *(hidden(f"{type(error).__name__}: {error}", token), repo_id),
        )
        return
    problem = _write_problem(user, repo_id)
    if problem is not None:
        raise SettingsError(f"hf_token {problem}")


def publish(
    weights: Path, repo_id: str, hf_token: Secret | None = None, from_request: bool = False
) -> str | None:
    """Uploads weights.zip, the files next to it and a model card in one commit.

    A new repository is private. Returns its URL, or None with a warning if the upload failed.
    """
    token = _token(hf_token, from_request)
    folder = weights.parent / UPLOAD  # used by this run only, since it has the lock
    try:
        _prepare(weights, repo_id, folder)
        api = HfApi(token=token.reveal())
        with _separate_session(from_request):
            url = api.create_repo(repo_id, private=True, exist_ok=True).url
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Trained weights")
    except Exception as error:
        log.warning(
            "the upload to %s failed (%s). The weights are saved in %s; to repeat the upload: %s",
            *(repo_id, hidden(f"{type(error).__name__}: {error}", token), weights),
            _command(repo_id, folder),
        )
        return None
    shutil.rmtree(folder, ignore_errors=True)
    log.info("uploaded to %s", url)
    return url


def withhold(weights: Path, repo_id: str, from_request: bool = False) -> None:
    """Warns that a result with failed checks is not uploaded, and how to upload it by hand."""
    if from_request:  # the user receives only weights.zip
        log.warning("not uploaded to %s, since checks failed; upload weights.zip by hand", repo_id)
        return
    folder = weights.parent / UPLOAD
    _prepare(weights, repo_id, folder)
    log.warning(
        "not uploaded to %s, since checks failed. To upload it by hand: %s. To upload such results "
        "in future runs: --allow-failed-checks",
        *(repo_id, _command(repo_id, folder)),
    )


def _prepare(weights: Path, repo_id: str, folder: Path) -> None:
    """Recreates the folder with the repository's files."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)  # from an earlier, failed upload of this run
    folder.mkdir()
    collect(weights, repo_id, folder)


def _command(repo_id: str, folder: Path) -> str:
    return (
        f"hf repo create {repo_id} --private --exist-ok && hf upload {repo_id} "
        f"{shlex.quote(str(folder))}"
    )


def collect(weights: Path, repo_id: str, folder: Path) -> None:
    """Collects the repository's files in a folder: weights, samples, report, model card."""
    with zipfile.ZipFile(weights) as zipped:
        meta = json.loads(zipped.read(archive.META))
        files = {archive.LORA: LORA}
        for number in range(max(1, len(tokens_in(meta)))):
            files[archive.placeholder_name(number)] = placeholder_file(number)
        for member, name in files.items():
            if member in zipped.namelist():
                with zipped.open(member) as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
    _link(weights, folder / WEIGHTS)
    report = weights.parent / REPORT
    if report.is_file():
        _link(report, folder / REPORT)
    samples = []
    for prompt, image in _samples(weights.parent, meta):
        path = f"{SAMPLES}/{image.name}"
        _link(image, folder / path)
        samples.append((prompt, path))
    (folder / "README.md").write_text(model_card(repo_id, meta, samples), encoding="utf-8")


def _samples(output: Path, meta: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The sample prompts, each with its first image of the weights."""
    step = meta.get("shipped_step", meta["steps"])
    folder = output / SAMPLES / f"step-{step:06d}"
    prompts = meta["settings"].get("sample_prompts") or []
    generated = [(prompt, folder / f"{number:02d}.png") for number, prompt in enumerate(prompts)]
    return [(prompt, image) for prompt, image in generated if image.is_file()]


def _link(source: Path, target: Path) -> None:
    """Hard-links the file, or copies it if the file system does not support links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _separate_session(from_request: bool) -> Iterator[None]:
    """Context in which a request shares no cookies of huggingface_hub with other requests."""
    if not from_request:
        yield
        return
    close_session()
    try:
        yield
    finally:
        close_session()


def _token(hf_token: Secret | None, from_request: bool) -> Secret:
    """The given token; outside of requests the default is HF_TOKEN or `hf auth login`."""
    if hf_token is None and from_request:
        raise SettingsError(
            "hf_repo_id needs hf_token in the same request; create one with write access at "
            "https://huggingface.co/settings/tokens"
        )
    if hf_token is None:
        kept = get_token()
        if not kept:
            raise SettingsError(
                "hf_repo_id needs hf_token, HF_TOKEN in the environment, or `hf auth login`; "
                "create one with write access at https://huggingface.co/settings/tokens"
            )
        hf_token = Secret(kept)
    value = hf_token.reveal()  # the Hub checks whether it is valid
    if not value.isascii() or not value.isprintable() or " " in value:
        raise SettingsError("hf_token contains characters that no token has; copy it again")
    return hf_token


def _write_problem(user: Mapping[str, Any], repo_id: str) -> str | None:
    """Why the token of `user` (the Hub's response to whoami) may not write there, or None.

    A fine-grained token lists its permissions; a response of unknown form counts as permitted.
    """
    owner = repo_id.split("/")[0]
    names = [user.get("name"), *(each.get("name") for each in user.get("orgs") or [])]
    if owner.lower() not in {str(name).lower() for name in names}:
        known = ", ".join(str(name) for name in names)
        return (
            f"belongs to {known}, but the owner in hf_repo_id is {owner}; use one of them as OWNER"
        )
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return f"({token.get('displayName')}) is read-only; create one with write access"
    fine = token.get("fineGrained")
    if token.get("role") == "fineGrained" and isinstance(fine, dict):
        for scope in fine.get("scoped") or []:
            entity = scope.get("entity") or {}
            covers = str(entity.get("name", "")).lower() in (owner.lower(), repo_id.lower())
            if covers and "repo.write" in (scope.get("permissions") or []):
                return None
        return f"({token.get('displayName')}) has no write access to repositories of {owner}"
    return None
