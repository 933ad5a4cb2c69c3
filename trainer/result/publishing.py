"""Publishing: the result of a training as a model repository on the Hub.

What can fail is asked before a training starts. An upload that fails at its end is a warning that
says how to repeat it: the weights are on disk by then.
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
from trainer.result.model_card import LORA, PLACEHOLDER, WEIGHTS, model_card
from trainer.result.report import NAME as REPORT
from trainer.run_files import UPLOAD
from trainer.settings import Secret, SettingsError, hidden

log = logging.getLogger(__name__)


def check_repository(
    repo_id: str, hf_token: Secret | None = None, from_request: bool = False
) -> None:
    """Raises `SettingsError` where an upload at the end could not succeed.

    Asks the Hub who the token belongs to and whether it may write there. Where the Hub cannot be
    reached this is a warning: by the end of the training it may be. With `from_request` the token
    is the customer's, and no token of the server's operator takes its place.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SettingsError(f"hf_repo_id: {error}") from error
    if repo_id.count("/") != 1:
        raise SettingsError(f"hf_repo_id is {repo_id!r}; write it as OWNER/NAME")
    token = _token(hf_token, from_request)
    try:
        with _session_of_its_own(from_request):
            user = HfApi(token=token.reveal()).whoami()
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise SettingsError(
                "hf_token is refused by the Hub; make a new one with write access at "
                "https://huggingface.co/settings/tokens"
            ) from None
        log.warning("the Hub could not be asked about hf_token (%s)", hidden(error, token))
        return
    except Exception as error:  # no network, a proxy's page, …
        log.warning(
            "the Hub cannot be reached (%s); the upload to %s is tried at the end all the same",
            *(hidden(f"{type(error).__name__}: {error}", token), repo_id),
        )
        return
    fault = _may_not_write(user, repo_id)
    if fault is not None:
        raise SettingsError(f"hf_token {fault}")


def publish(
    weights: Path, repo_id: str, hf_token: Secret | None = None, from_request: bool = False
) -> str | None:
    """Uploads a finished weights.zip, the files next to it and a model card, in one commit.

    A new repository is private. Returns its address; None, with a warning, where that failed.
    """
    token = _token(hf_token, from_request)
    folder = weights.parent / UPLOAD  # of this run alone, which holds the lock
    try:
        _prepare(weights, repo_id, folder)
        api = HfApi(token=token.reveal())
        with _session_of_its_own(from_request):
            address = api.create_repo(repo_id, private=True, exist_ok=True).url
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Trained weights")
    except Exception as error:
        log.warning(
            "the upload to %s failed (%s). The weights are safe in %s; to repeat it: %s",
            *(repo_id, hidden(f"{type(error).__name__}: {error}", token), weights),
            _command(repo_id, folder),
        )
        return None
    shutil.rmtree(folder, ignore_errors=True)
    log.info("uploaded to %s", address)
    return address


def withhold(weights: Path, repo_id: str, from_request: bool = False) -> None:
    """Uploads nothing, and warns how to upload by hand a result whose checks failed."""
    if from_request:  # the customer has weights.zip alone
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
    """Makes the folder with the repository's files anew."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)  # of an earlier upload of this run, which failed
    folder.mkdir()
    collect(weights, repo_id, folder)


def _command(repo_id: str, folder: Path) -> str:
    return (
        f"hf repo create {repo_id} --private --exist-ok && hf upload {repo_id} "
        f"{shlex.quote(str(folder))}"
    )


def collect(weights: Path, repo_id: str, folder: Path) -> None:
    """Lays the repository's files into a folder: weights, samples, report, model card."""
    with zipfile.ZipFile(weights) as zipped:
        meta = json.loads(zipped.read(archive.META))
        for member, name in ((archive.LORA, LORA), (archive.PLACEHOLDER, PLACEHOLDER)):
            if member in zipped.namelist():
                with zipped.open(member) as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
    _link(weights, folder / WEIGHTS)
    report = weights.parent / REPORT
    if report.is_file():
        _link(report, folder / REPORT)
    samples = []
    for prompt, picture in _samples(weights.parent, meta):
        path = f"{SAMPLES}/{picture.name}"
        _link(picture, folder / path)
        samples.append((prompt, path))
    (folder / "README.md").write_text(model_card(repo_id, meta, samples), encoding="utf-8")


def _samples(output: Path, meta: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The sample prompts with the first picture each that was drawn at the last step."""
    folder = output / SAMPLES / f"step-{meta['steps']:06d}"
    prompts = meta["settings"].get("sample_prompts") or []
    generated = [(prompt, folder / f"{number:02d}.png") for number, prompt in enumerate(prompts)]
    return [(prompt, picture) for prompt, picture in generated if picture.is_file()]


def _link(source: Path, target: Path) -> None:
    """The file under another name, without its bytes twice where the disk can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _session_of_its_own(from_request: bool) -> Iterator[None]:
    """Inside, huggingface_hub has no cookies of earlier calls, and afterwards none of these."""
    if not from_request:
        yield
        return
    close_session()
    try:
        yield
    finally:
        close_session()


def _token(hf_token: Secret | None, from_request: bool) -> Secret:
    """The token that was given; outside of requests else that of HF_TOKEN or `hf auth login`."""
    if hf_token is None and from_request:
        raise SettingsError(
            "hf_repo_id needs hf_token in the same request; make one with write access at "
            "https://huggingface.co/settings/tokens"
        )
    if hf_token is None:
        kept = get_token()
        if not kept:
            raise SettingsError(
                "hf_repo_id needs hf_token, HF_TOKEN in the environment, or `hf auth login`; "
                "make one with write access at https://huggingface.co/settings/tokens"
            )
        hf_token = Secret(kept)
    value = hf_token.reveal()  # whether it is a token is for the Hub to say
    if not value.isascii() or not value.isprintable() or " " in value:
        raise SettingsError("hf_token holds characters that no token has; copy it again")
    return hf_token


def _may_not_write(user: Mapping[str, Any], repo_id: str) -> str | None:
    """Why the token of `user` (the Hub's answer to whoami) may not write there, or None.

    A fine-grained token says for whom it may; where the answer is of another form, nothing is said.
    """
    owner = repo_id.split("/")[0]
    names = [user.get("name"), *(each.get("name") for each in user.get("orgs") or [])]
    if owner.lower() not in {str(name).lower() for name in names}:
        known = ", ".join(str(name) for name in names)
        return f"belongs to {known}, and hf_repo_id to {owner}; write OWNER/NAME with one of them"
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return f"({token.get('displayName')}) may only read; make one that may write"
    fine = token.get("fineGrained")
    if token.get("role") == "fineGrained" and isinstance(fine, dict):
        for scope in fine.get("scoped") or []:
            entity = scope.get("entity") or {}
            covers = str(entity.get("name", "")).lower() in (owner.lower(), repo_id.lower())
            if covers and "repo.write" in (scope.get("permissions") or []):
                return None
        return f"({token.get('displayName')}) may not write to repositories of {owner}"
    return None
