"""Who may upload where: checked before a training, with the request's own token alone."""

from pathlib import Path

import pytest
from cards import Finished
from hub_server import Hub

from trainer.result.publishing import check_repository, publish
from trainer.settings.fields import SettingsError
from trainer.settings.inputs import TrainingInputs
from trainer.settings.secret import Secret


@pytest.mark.parametrize("name", ["fox", "me/fox/more", "me/fo x", "/fox", "me/fox--", "me/-fox"])
def test_a_name_that_the_hub_would_refuse_is_refused_first(name: str, hub: Hub) -> None:
    with pytest.raises(SettingsError, match="hf_repo_id"):
        check_repository(name, Secret(hub.token))
    assert hub.asked == []


def test_without_a_token_it_says_where_one_comes_from(hub: Hub) -> None:
    with pytest.raises(SettingsError, match="needs hf_token, HF_TOKEN .* https://huggingface.co/"):
        check_repository("me/fox")


@pytest.mark.parametrize("token", ["Bearer hf_x", "hf_a\nb", "hf_ü", "hf_\x00"])
def test_a_token_that_no_header_can_hold_is_refused_unasked_and_unshown(
    token: str, hub: Hub
) -> None:
    with pytest.raises(SettingsError, match="characters that no token has") as refusal:
        check_repository("me/fox", Secret(token))
    assert token not in str(refusal.value) and hub.asked == []


@pytest.mark.parametrize("token", ["hf_wrong", "api_org_wrong", "abc"])
def test_a_token_the_hub_does_not_know_is_refused(token: str, hub: Hub) -> None:
    with pytest.raises(SettingsError, match="rejected by the Hub"):
        check_repository("me/fox", Secret(token))
    assert hub.asked == ["/api/whoami-v2"]


def test_the_hub_decides_what_a_token_looks_like(hub: Hub) -> None:
    hub.token = "oauth-0123456789"
    check_repository("me/fox", Secret(hub.token))


OPERATOR = "hf_operator" + "y" * 20


@pytest.fixture
def operators_login(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, on a machine whose operator is logged in everywhere, and may write everywhere."""
    from huggingface_hub import constants

    hub.token = OPERATOR
    login, netrc = tmp_path / "login", tmp_path / "netrc"
    login.write_text(OPERATOR)
    netrc.write_text(f"machine 127.0.0.1 login me password {OPERATOR}\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(login))
    monkeypatch.setenv("HF_TOKEN", OPERATOR)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", OPERATOR)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setattr("huggingface_hub.hf_api.api.token", OPERATOR)
    return hub


@pytest.mark.parametrize("repository", ["me/fox", "other/fox"])
@pytest.mark.parametrize("token", [None, " \n"])
def test_a_request_without_a_token_is_refused_before_its_dataset_is_read(
    repository: str, token: str | None, operators_login: Hub, tmp_path: Path
) -> None:
    from trainer.run import train_from_inputs

    with pytest.raises(SettingsError, match="hf_repo_id needs hf_token in the same req") as refusal:
        train_from_inputs(
            TrainingInputs(
                dataset=tmp_path / "is-not-there.zip",
                output_dir=tmp_path / "out",
                hf_repo_id=repository,
            ),
            served=True,
            hf_token=token,
        )
    said = str(refusal.value)
    assert operators_login.asked == [] and not (tmp_path / "out").exists()
    assert not any(name in said for name in ("me", "studio", "HF_TOKEN") if name in said.split())


def test_a_request_uploads_with_its_own_token_alone(
    operators_login: Hub, finished: Finished, tmp_path: Path
) -> None:
    hub = operators_login
    hub.token = "hf_customer" + "z" * 20
    check_repository("me/fox", Secret(hub.token), from_request=True)
    assert publish(finished(), "me/fox", Secret(hub.token), from_request=True) is not None
    assert {each for each in hub.authorizations if each} == {f"Bearer {hub.token}"}


def test_on_the_command_line_the_login_counts(operators_login: Hub, finished: Finished) -> None:
    check_repository("me/fox")
    assert publish(finished(), "me/fox") is not None


def test_no_cookie_of_one_request_is_sent_with_the_next(hub: Hub, finished: Finished) -> None:
    hub.set_cookie = "session=anna; Path=/"
    check_repository("me/fox", Secret(hub.token), from_request=True)
    assert publish(finished(), "me/fox", Secret(hub.token), from_request=True) is not None
    hub.cookies.clear()
    check_repository("me/fox", Secret(hub.token), from_request=True)
    assert hub.cookies == [None]


@pytest.mark.parametrize("name", ["me/fox", "Me/fox", "studio/fox"])
def test_a_token_that_may_write_there_is_taken(name: str, hub: Hub) -> None:
    check_repository(name, Secret(hub.token))
    assert hub.asked == ["/api/whoami-v2"] and hub.files == {}


def test_a_repository_of_somebody_else_is_refused(hub: Hub) -> None:
    message = "belongs to me, studio, but the owner in hf_repo_id is other"
    with pytest.raises(SettingsError, match=message):
        check_repository("other/fox", Secret(hub.token))


def test_a_token_that_may_only_read_is_refused(hub: Hub) -> None:
    hub.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(SettingsError, match="is read-only"):
        check_repository("me/fox", Secret(hub.token))


def test_a_fine_grained_token_must_cover_the_repository(hub: Hub) -> None:
    def scope(name: str, *permissions: str) -> None:
        scoped = [{"entity": {"type": "user", "name": name}, "permissions": list(permissions)}]
        hub.user["auth"]["accessToken"] = {
            "displayName": "fine",
            "role": "fineGrained",
            "fineGrained": {"scoped": scoped, "global": []},
        }

    scope("me", "repo.content.read", "repo.write")
    check_repository("me/fox", Secret(hub.token))
    for name, permission in (("studio", "repo.write"), ("me", "repo.content.read")):
        scope(name, permission)
        with pytest.raises(SettingsError, match="has no write access to repositories of me"):
            check_repository("me/fox", Secret(hub.token))


def test_a_hub_out_of_reach_does_not_stop_a_training(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_repository("me/fox", Secret(hub.token))
    assert "cannot be reached" in caplog.text and hub.token not in caplog.text
