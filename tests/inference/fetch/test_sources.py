"""Weights by name: what is fetched, from where it is never fetched, and what stays on the disk.

Everything goes over real TLS to a server on this machine; only the name server is ours.
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_server import PUBLIC, Reply, Web, served

from inference.fetch.disk_cache import DiskCache
from inference.fetch.download import Downloader, DownloadError
from inference.fetch.sources import FRESH_SECONDS, HubFile, SourceError, Sources


@pytest.fixture
def web() -> Iterator[Web]:
    with served() as web:
        yield web


@pytest.fixture
def sources(web: Web, tmp_path: Path) -> Sources:
    return Sources(web.downloader(), DiskCache(tmp_path / "cache"))


def files(sources: Sources) -> list[Path]:
    """Everything that lies in the cache, hidden or unfinished."""
    return [path for path in sources.cache.folder.rglob("*") if path.is_file()]


# Over https, from the open internet.


def test_a_url_is_fetched_through_its_redirects(web: Web, sources: Sources) -> None:
    web.pages["weights.example/a.zip"] = 302, {"Location": "https://cdn.example/b?signed=1"}, b""
    web.pages["cdn.example/b"] = 200, {}, b"content"
    assert sources.file("https://weights.example/a.zip?x=1").read_bytes() == b"content"
    assert [place for place, _ in web.asked] == [
        "weights.example/a.zip?x=1",
        "cdn.example/b?signed=1",
    ]


@pytest.mark.parametrize("inside", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "::1"])
def test_a_name_that_leads_inside_is_never_connected_to(
    inside: str, web: Web, sources: Sources
) -> None:
    web.names["weights.example"] = [PUBLIC, inside]  # one inside is enough
    with pytest.raises(DownloadError, match="weights.example is not a public address"):
        sources.file("https://weights.example/a.zip")
    assert web.asked == []


def test_an_address_in_place_of_a_name_is_no_way_round(tmp_path: Path) -> None:
    sources = Sources(Downloader(pause=0), DiskCache(tmp_path))  # with the system's own resolver
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "169.254.169.254"):
        with pytest.raises(DownloadError, match="not a public address"):
            sources.file(f"https://{host}/latest/meta-data")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("https://inside.example/x", "inside.example is not a public address"),
        ("http://cdn.example/x", "over https only, not http"),
        ("file:///etc/passwd", "over https only, not file"),
        ("https://weights.example/loop", "redirects more than 5 times"),
    ],
)
def test_a_redirect_goes_nowhere_that_a_url_may_not(
    target: str, reason: str, web: Web, sources: Sources
) -> None:
    web.names["inside.example"] = ["10.0.0.1"]
    web.pages["weights.example/a.zip"] = 302, {"Location": target}, b""
    web.pages["weights.example/loop"] = 302, {"Location": "/loop"}, b""
    with pytest.raises(DownloadError, match=reason):
        sources.file("https://weights.example/a.zip")
    assert files(sources) == []


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("http://weights.example/a.zip", "over https only, not http"),
        ("ftp://weights.example/a.zip", "over https only, not ftp"),
        ("https://user:secret@weights.example/a.zip", "no host, or"),
        ("https://weights.example:99999/a.zip", "is not a valid URL"),
        ("https://weights.example/a b", "percent-encode"),
        ("https://weights.example/missing", r"not found \(404\)"),
        ("https://weights.example/private", r"access denied \(403\); it is private"),
        ("data:application/zip,abc", "not a data URL in base64"),
        ("data:application/zip;base64,%%%", "is damaged"),
        ("nowhere.zip", "nowhere.zip: no such file; pass a file, an https URL, or hf:"),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_reason(
    source: str, reason: str, web: Web, sources: Sources
) -> None:
    web.pages["weights.example/private"] = 403, {}, b""
    with pytest.raises(ValueError, match=reason) as refused:
        sources.file(source)
    assert "secret" not in str(refused.value)
    assert files(sources) == []


def test_a_folder_in_place_of_a_file_is_said_to_be_one(sources: Sources, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="run is a folder; pass a file"):
        sources.file(str(run))
    (run / "weights.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="run is a folder; did you mean .*run/weights.zip?"):
        sources.file(str(run))


def test_a_certificate_of_another_host_is_refused(web: Web, sources: Sources) -> None:
    web.names["other.example"] = [PUBLIC]
    with pytest.raises(DownloadError, match="other.example.*mismatch"):
        sources.file("https://other.example/a.zip")


def test_a_file_that_is_too_large_is_refused_whether_it_says_so_or_not(
    web: Web, tmp_path: Path
) -> None:
    sources = Sources(web.downloader(most=1000), DiskCache(tmp_path))
    web.pages["weights.example/says"] = 200, {}, bytes(1001)
    web.pages["weights.example/silent"] = 200, {"Transfer-Encoding": "chunked"}, chunked(2000)
    web.pages["weights.example/fits"] = 200, {}, bytes(1000)
    with pytest.raises(DownloadError, match="the file has 1,001 bytes; 1,000 is the limit"):
        sources.file("https://weights.example/says")
    with pytest.raises(DownloadError, match="more than 1,000 bytes"):
        sources.file("https://weights.example/silent")
    assert sources.file("https://weights.example/fits").stat().st_size == 1000
    assert not [path for path in files(sources) if path.suffix == ".part"]


def chunked(size: int) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (size, bytes(size))


def test_a_server_that_stumbles_is_asked_again_and_not_for_ever(web: Web, sources: Sources) -> None:
    replies: list[Reply] = [
        (503, {}, b"busy"),
        (200, {"Content-Length": "7", "Connection": "close"}, b"cont"),  # cut short
        (200, {}, b"content"),
    ]
    web.pages["weights.example/a"] = lambda _: replies.pop(0)
    web.pages["weights.example/b"] = 500, {}, b""
    assert sources.file("https://weights.example/a").read_bytes() == b"content"
    before = len(web.asked)
    with pytest.raises(DownloadError, match="could not be fetched in 3 attempts: .* answered 500"):
        sources.file("https://weights.example/b")
    assert len(web.asked) - before == 3


# On the Hub.


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("hf:a/b", HubFile("a/b")),
        ("hf:a/b/c.safetensors", HubFile("a/b", "c.safetensors")),
        ("hf:a/b/d/c.safetensors@v1", HubFile("a/b", "d/c.safetensors", "v1")),
        ("huggingface.co/a/b", HubFile("a/b")),
        ("https://huggingface.co/a/b/", HubFile("a/b")),
        ("huggingface.co/a/b/c.safetensors", HubFile("a/b", "c.safetensors")),
        ("https://huggingface.co/a/b/tree/dev", HubFile("a/b", None, "dev")),
        (
            "https://huggingface.co/a/b/resolve/main/c%20d.safetensors?download=true",
            HubFile("a/b", "c d.safetensors"),
        ),
        ("https://huggingface.co/a/b/blob/9f2/c.zip", HubFile("a/b", "c.zip", "9f2")),
        ("https://huggingface.co.example/a/b", None),
        ("a/b", None),  # Replicate's or the Hub's? It has to say.
    ],
)
def test_every_way_to_name_a_file_on_the_hub(source: str, found: HubFile | None) -> None:
    assert HubFile.parse(source) == found


def test_a_repository_with_one_safetensors_needs_no_file_name(web: Web, sources: Sources) -> None:
    on_hub(web, "a/b", "main", ["README.md", "lora.safetensors"])
    web.pages["huggingface.co/a/b/resolve/main/lora.safetensors"] = 200, {}, b"lora"
    assert sources.file("huggingface.co/a/b").read_bytes() == b"lora"


def test_a_repository_with_several_asks_for_one(web: Web, sources: Sources) -> None:
    on_hub(web, "a/b", "v2", ["one.safetensors", "two.safetensors"])
    on_hub(web, "a/none", "main", ["README.md"])
    with pytest.raises(SourceError, match="has 2 .safetensors files; .* hf:a/b/one.safetensors"):
        sources.file("https://huggingface.co/a/b/tree/v2")
    with pytest.raises(SourceError, match="a/none on the Hub has no .safetensors"):
        sources.file("hf:a/none")


def on_hub(web: Web, repository: str, revision: str, names: list[str]) -> None:
    answer = json.dumps({"siblings": [{"rfilename": name} for name in names]}).encode()
    web.pages[f"huggingface.co/api/models/{repository}/revision/{revision}"] = 200, {}, answer


def test_a_token_opens_the_hub_and_is_told_to_nobody_else(
    web: Web, sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    def guarded(headers: dict[str, str]) -> Reply:
        if headers.get("authorization") != "Bearer hf_secret":
            return 401, {}, b""
        return 302, {"Location": "https://cdn.example/lora?signature=1"}, b""

    web.pages["huggingface.co/a/b/resolve/main/c.safetensors"] = guarded
    web.pages["cdn.example/lora"] = 200, {}, b"private"
    assert sources.file("hf:a/b/c.safetensors", "hf_secret").read_bytes() == b"private"
    reported = {place.split("?")[0]: headers.get("authorization") for place, headers in web.asked}
    assert reported["cdn.example/lora"] is None

    # What the token opened stays closed for whoever has none, and for other hosts.
    with pytest.raises(DownloadError, match=r"access denied \(401\); it is private"):
        sources.file("hf:a/b/c.safetensors")
    with pytest.raises(DownloadError, match="the token has no access to it"):
        sources.file("hf:a/b/c.safetensors", "hf_other")
    web.pages["weights.example/a"] = 200, {}, b"a"
    sources.file("https://weights.example/a", "hf_secret")
    assert "authorization" not in web.asked[-1][1]
    with pytest.raises(DownloadError, match="the token contains characters") as refused:
        sources.file("hf:a/b/c.safetensors", "hf_secret\nHost: x")
    assert "hf_secret" not in str(refused.value) + caplog.text
    written = b"".join(path.read_bytes() for path in files(sources))
    assert b"hf_secret" not in written


# On the disk.


def test_a_file_is_fetched_once_and_asked_for_again_when_time_has_passed(
    web: Web, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"tag": b"one"}

    def page(headers: dict[str, str]) -> Reply:
        etag = f'"{content["tag"].decode()}"'
        if headers.get("if-none-match") == etag:
            return 304, {"ETag": etag}, b""
        return 200, {"ETag": etag}, content["tag"]

    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    web.pages["weights.example/a"] = page
    url = "https://weights.example/a"
    first = sources.file(url)
    assert sources.file(url) == first
    assert len(web.asked) == 1

    now += FRESH_SECONDS + 1
    assert sources.file(url) == first  # asked, and nothing was sent
    assert len(web.asked) == 2
    assert sources.file(url) == first
    assert len(web.asked) == 2

    now += FRESH_SECONDS + 1
    content["tag"] = b"two"
    assert sources.file(url).read_bytes() == b"two"
    assert first.read_bytes() == b"one"


def test_equal_content_lies_on_the_disk_once(web: Web, sources: Sources) -> None:
    web.pages["weights.example/a"] = web.pages["cdn.example/b"] = 200, {}, b"same"
    assert sources.file("https://weights.example/a") == sources.file("https://cdn.example/b")


def test_beyond_the_budget_the_least_recently_used_goes(web: Web, tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, budget=250)
    sources = Sources(web.downloader(), cache)
    for name in "abc":
        web.pages[f"weights.example/{name}"] = 200, {}, name.encode() * 100
    a, b = (sources.file(f"https://weights.example/{name}") for name in "ab")
    for age, path in enumerate((b, a)):  # as if an hour had passed, and b was used before a
        os.utime(path, (1e9 + age, 1e9 + age))
    assert sources.file("https://weights.example/b") == b  # is used
    c = sources.file("https://weights.example/c")
    assert (a.exists(), b.exists(), c.exists()) == (False, True, True)
    assert sources.file("https://weights.example/a").read_bytes() == b"a" * 100  # fetched again


ODD_SOURCES = [
    *("https://weights.example/\x1b[31m.zip?sig=s3cret", "http://weights.example/a?sig=s3cret"),
    *("https://weights.example:port/a?sig=s3cret", "https://[::1/a?sig=s3cret#s3cret"),
    *("https://user:s3cret@weights.example/a", "https://weights.example\n/a?sig=s3cret"),
    *("https://weights.example/missing?sig=s3cret", "https://weights.example/away?sig=s3cret"),
    *("https://" + "a" * 300 + ".example/?sig=s3cret", "https://" + "a" * 9000 + "?s3cret"),
    *(
        "https://weights.example/odd?sig=s3cret",
        "https://\udcff.example/?s3cret",
        "https://?s3cret",
    ),
    *("hf:a/b/\x1b[31m.zip", "hf:a/\u0661/c@\udcff", "hf:a/b/" + "x" * 9000, "huggingface.co/a/b"),
    *(
        "data:\x1b[31m,x",
        "data:;base64,\u00e9",
        "\x1b[31m.zip",
        "\udcff.zip",
        "a" * 9000,
        "\0",
        "~x/y",
    ),
    *(
        "javascript:alert(1)",
        "file:///etc/passwd",
        "https:weights.example",
        "://",
        "https://\u2028/",
    ),
]


@pytest.mark.parametrize("source", ODD_SOURCES, ids=ascii)
@pytest.mark.parametrize("any_file", [True, False])
def test_no_refusal_shows_a_secret_or_a_control_character(
    any_file: bool, source: str, web: Web, sources: Sources, caplog: pytest.LogCaptureFixture
) -> None:
    strange = "\x1b[31m" + "x" * 300
    away = {"Location": "https://[" + "s3cret"}
    web.pages["weights.example/away"] = 302, away, b""
    web.pages["weights.example/odd"] = 418, {"ETag": strange}, b""
    names = [{"rfilename": f"{strange}{number}.safetensors"} for number in range(20)]
    answer = json.dumps({"siblings": [1, {}, {"rfilename": 3}, *names]}).encode()
    web.pages["huggingface.co/api/models/a/b/revision/main"] = 200, {}, answer
    with pytest.raises(ValueError) as refused:
        sources.file(source, any_file=any_file)
    assert isinstance(refused.value, DownloadError | SourceError)
    message = str(refused.value) + caplog.text.replace("\n", "")
    assert message.isprintable() and len(message) < 1700, message
    assert "s3cret" not in message


# By value.


def test_a_data_url_is_the_file_itself(sources: Sources) -> None:
    url = "data:application/zip;base64," + base64.b64encode(b"weights").decode()
    assert sources.file(url).read_bytes() == b"weights"
