"""Texts that leave the program: what is removed from them, and what stays."""

import logging
import os
import re
import sys
import time
from pathlib import Path

import pytest

from inference.console import (
    clean,
    clean_for,
    log_to_console,
    log_to_file,
    of_a_library,
    one_message,
    stopped_quietly,
    texts,
)
from serving.inputs import reason

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def test_every_control_character_is_shown_as_an_escape() -> None:
    every = "".join(
        map(chr, [*range(0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xD800])
    )
    assert not CONTROL.search(clean(every))
    assert "\\x1b" in clean("\x1b[31m")


@pytest.mark.parametrize("text", ["a photo of <zwx>, 👩‍🚀", "tab\there\nline", "naïve 東京 ½"])
def test_other_characters_stay(text: str) -> None:
    assert clean(text) == clean_for(text, ()) == text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://h/p?sig=abc", "https://h/p"),
        ("'https://h/p?sig=abc': nothing there", "'https://h/p': nothing there"),
        ("(https://h/p?a=1&sig='abc')", "(https://h/p')"),
        ("HTTPS://h/p#sig=abc.", "HTTPS://h/p."),
        ("s3://user:abc@h/p", "s3://h/p"),
        ("https://abc@h:1/p?abc https://g/q?abc", "https://h:1/p https://g/q"),
        ("is it there? yes", "is it there? yes"),
    ],
)
def test_addresses_lose_their_queries_and_passwords(text: str, shown: str) -> None:
    assert clean(text) == shown


@pytest.mark.parametrize("piece", ["a.", "a://", "://", "?", "'/a", "/a ", "@", ")", "tmp", "\r"])
def test_no_text_takes_long_to_clean(piece: str) -> None:
    start = time.process_time()
    clean_for("x://" + piece * 100_000, ["/known"])
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text, shown",
    [
        ("no /src/model/x.py", "no <path>"),
        ("cannot open '/home/me/My Files/x'", "cannot open '<path>'"),
        ("FileNotFoundError: /a/b/c: gone", "FileNotFoundError: <path>: gone"),
        ("see file:///a/b", "see <path>"),
        ("path=/a/b", "path=<path>"),
        ("tmpgzw1x2y3.zip: is broken", "<file>: is broken"),
        ("/data/mine.zip: is broken", "/data/mine.zip: is broken"),
        ("https://h/p/q and lora/x.safetensors, 2/3, step/s, </html>",) * 2,
    ],
)
def test_paths_that_a_request_did_not_contain_are_hidden(text: str, shown: str) -> None:
    assert clean_for(text, ["/data/mine.zip"]) == shown


def test_paths_below_the_working_folder_become_relative() -> None:
    assert clean_for(f"saved {os.getcwd()}/outputs/weights.zip", ()) == "saved outputs/weights.zip"


def test_a_line_break_in_a_request_begins_no_line() -> None:
    text = "x\nerror: all is lost"
    assert "\n" not in clean_for(f"prompt {text!s}", texts({"input": [{"prompt": text}]}))


def test_the_log_on_a_server_has_neither_tracebacks_nor_paths(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    log = logging.getLogger("test")
    for known in ([], None):
        log_to_console(known)
        logging.root.handlers[0].stream = sys.stdout  # type: ignore[attr-defined]
        try:
            raise ValueError("at /a/b")
        except ValueError:
            log.warning("failed", exc_info=True)
        said = capsys.readouterr().out
        assert ("Traceback" in said) == ("/a/b" in said) == (known is None)
    log_to_console(None)


@pytest.mark.parametrize(
    "error, inputs, line",
    [
        (
            ValueError("/tmp/tmpabcd1234x.zip: is\nbroken"),
            {"dataset": Path("/tmp/tmpabcd1234x.zip")},
            "dataset: is; broken",
        ),
        (
            ValueError("image tmpabcd1234x.png is empty"),
            {"image": Path("/tmp/tmpabcd1234x.png")},
            "image is empty",
        ),
        (
            ValueError("https://h/x.zip: nothing there"),
            {"prompt": "x", "lora_weights": "https://h/x.zip?sig=abc"},
            "lora_weights: https://h/x.zip: nothing there",
        ),
        (
            ValueError("myzip: does not exist"),
            {"prompt": "x", "dataset": "myzip"},
            "dataset: myzip: does not exist",
        ),
        (
            ValueError("'a.zip' is not a file that a request may name"),
            {"lora_weights": "a.zip"},
            "lora_weights: 'a.zip' is not a file that a request may name",
        ),
        (
            ValueError("h.example/x: no such file"),
            {"lora_weights": "h.example/x?token=SECRET"},
            "lora_weights: h.example/x: no such file",
        ),
        (ValueError("a" * 64 + ": broken"), {"lora": "hf:a/b"}, "lora: broken"),
        (OSError(28, "No space left", "/tmp/x"), {}, "[Errno 28] No space left: '<path>'"),
        (RuntimeError("CUDA out of memory"), {}, "RuntimeError: CUDA out of memory"),
        (ValueError(""), {}, "ValueError"),
    ],
)
def test_the_reason_of_a_failure_is_one_line_about_the_input(
    error: Exception, inputs: dict[str, object], line: str
) -> None:
    assert reason(error, inputs) == line


@pytest.mark.parametrize(
    "name, inputs, part",
    [
        ("replicate_weights", {"replicate_weights": "https://127.0.0.1/x?sig=abc"}, "not a public"),
        ("extra_lora", {"lora_weights": "", "extra_lora": "https://0x7f.1/x"}, "not a public"),
        ("lora_weights", {"lora_weights": "/etc/passwd"}, "lora_weights is not a file that a re"),
        ("replicate_weights", {"replicate_weights": "file:///etc/passwd"}, "over https only"),
        ("extra_lora", {"extra_lora": "  "}, "'' is not a file that a request may name"),
        ("lora_weights", {"lora_weights": "data:;base64,AAAA"}, "not a whole safetensors file"),
        (
            "hf_api_token",
            {"hf_api_token": "hf_a\nb", "lora_weights": "hf:a/b/c.zip"},
            "no token has",
        ),
        ("image", {"image": "data:;base64,AAAA"}, "is not a JPEG, PNG, WebP, HEIC"),
    ],
)
def test_a_wrong_file_or_address_is_named_by_its_input(
    name: str, inputs: dict[str, str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inference.engine import Engine
    from inference.inputs import GenerationInputs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    token = inputs.get("hf_api_token")
    given = {key: text for key, text in inputs.items() if key != "hf_api_token"}
    with pytest.raises(ValueError) as refusal:
        asked = GenerationInputs(prompt="a fox", **given)
        Engine().predict(asked, hf_api_token=token, output_dir=None)
    line = reason(refusal.value, {"prompt": "a fox", **inputs})
    assert line.startswith(name) and part in line and "sig" not in line


def record_of(name: str, path: str, level: int, text: str = "x") -> logging.LogRecord:
    return logging.LogRecord(name, level, path, 1, text, (), None)


@pytest.mark.parametrize(
    ("name", "path", "level", "hidden"),
    [
        ("transformers.x", "/v/site-packages/transformers/x.py", logging.WARNING, True),
        ("transformers.x", "/v/site-packages/transformers/x.py", logging.ERROR, False),
        ("trainer.run", "/v/site-packages/trainer/run.py", logging.INFO, False),
        ("their_script", "/home/me/their_script.py", logging.INFO, False),
    ],
)
def test_what_a_library_logs_below_an_error_is_not_shown(
    name: str, path: str, level: int, hidden: bool
) -> None:
    assert of_a_library(record_of(name, path, level)) is hidden


def test_the_log_file_has_what_the_console_leaves_out(tmp_path: Path) -> None:
    record = record_of("torch.x", "/v/site-packages/torch/x.py", logging.WARNING, "old kernel")
    assert of_a_library(record)
    with log_to_file(tmp_path / "log.txt"):
        logging.root.handle(record)
    logging.root.handle(record)
    assert (tmp_path / "log.txt").read_text().count("old kernel") == 1


def test_an_error_is_one_message_and_has_its_traceback_only_for_debugging() -> None:
    with pytest.raises(SystemExit, match=r"^error: KeyError: 'x' \(--debug shows where\)$"):
        with one_message(False):
            raise KeyError("x")
    with pytest.raises(SystemExit, match="^error: no such file$"):
        with one_message(False), one_message(False, True, OSError):
            raise OSError("no such file")
    with pytest.raises(OSError), one_message(True, True, OSError):
        raise OSError("no such file")


def test_ctrl_c_has_no_traceback_and_the_exit_code_of_shells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, one_message(False), stopped_quietly(False):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"
    with pytest.raises(KeyboardInterrupt), stopped_quietly(True):
        raise KeyboardInterrupt
