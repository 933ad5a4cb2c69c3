"""Every page is whole, and every command that it teaches is one that works.

Commands go through the real parser of their program. The short ones that train and generate are
run; what needs Docker, a GPU, several GPUs or an account is listed with the reason.
"""

import argparse
import base64
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from cog_server import CogServer, copy_of_the_code
from documents import PAGES, PROGRAMS, Command, anchors, blocks, commands, inline, tokens
from root import ROOT

from inference.flags import Parser
from serving import schema
from serving.validation import Inputs
from trainer.__main__ import MODES, take_files
from trainer.__main__ import arguments_parser as trainer_parser
from trainer.commands import command_parser
from trainer.inbox import COMMAND_NAMES
from trainer.settings.config import read_config
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs
from zeroprior.__main__ import COMMANDS as ZEROPRIOR

COMMANDS = commands()
# What no test here can run or parse, and why.
CANNOT = {
    "docker": "needs Docker",
    "cog build": "needs Docker",
    "cog push": "needs Docker and an account",
    "pip install": "needs a network",
    "wandb": "needs an account",
    "hf": "needs an account",
    ".": "changes the shell itself",
    "python -m demo": "is run by test_demo.py",
    "tensorboard": "is run by test_trackers.py on the files of a run",
}
# Names that stand for a file of the user's, and what they are here.
STAND_IN = {
    "CONFIG.yaml": "configs/z_image_turbo.yaml",
    "config.yaml": "configs/z_image_turbo.yaml",
    "my_job.yaml": "configs/miniature.yaml",
    "job.toml": "configs/miniature.yaml",
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def reason(command: Command) -> str | None:
    words = " ".join(command.words)
    return next((why for start, why in CANNOT.items() if f"{words} ".startswith(f"{start} ")), None)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_the_text_of_a_page_holds_no_broken_markup(page: Path) -> None:
    text = [each.content for each in inline(page) if each.type == "text"]
    leftovers = [
        each for each in text if re.search(r"\[[^\]]+\](:|\[|\()|\]\(|^#+ |```|\*\*", each)
    ]
    assert leftovers == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = [
        str(each.attrs.get("href") or each.attrs.get("src"))
        for each in inline(page)
        if each.type in ("link_open", "image")
    ]
    broken = []
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_broken_markup_and_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Found by\n[hypothesis]: every picture\n\n[there](#nowhere)")
    with pytest.raises(AssertionError):
        test_the_text_of_a_page_holds_no_broken_markup(page)
    with pytest.raises(AssertionError):
        test_the_links_of_a_page_lead_somewhere(page)


def test_blocks_of_shell_hold_nothing_but_commands() -> None:
    shell = [each for each in COMMANDS if each.words[:1]]
    assert [str(each) for each in shell if each.words[0] not in PROGRAMS] == []
    assert {"README.md", "docs/serving.md", "docs/training.md"} <= {each.page for each in shell}


def test_every_reason_not_to_run_a_command_is_needed() -> None:
    reasons = {reason(each) for each in COMMANDS}
    assert set(CANNOT.values()) <= reasons


class Parsed(BaseException):
    """Thrown by the real parser when it has accepted a command."""


def raising(error: type[BaseException], after: Callable[..., Any]) -> Callable[..., NoReturn]:
    def call(*given: Any, **more: Any) -> NoReturn:
        after(*given, **more)
        raise error

    return call


def parse(module: str, arguments: list[str]) -> None:
    """What a module does with its command line, up to the end of parsing. SystemExit: refused."""
    if module == "trainer" and arguments[0] in COMMAND_NAMES:
        command_parser().parse_args(arguments)
        return
    if module == "trainer":
        mode = arguments[0] if arguments[0] in MODES else "train"
        parser = trainer_parser(mode)
        given = parser.read(arguments[mode != "train" :])
        for name in ("cpu", "json", "gpus"):
            given.pop(name, None)
        config = take_files(given, parser)
        given.setdefault("dataset", "imgs.zip")
        _ = read_config(config, **given) if config else resolve(TrainingInputs(**given))
        return
    with pytest.MonkeyPatch.context() as patch:
        for parser, name in ((argparse.ArgumentParser, "parse_args"), (Parser, "read")):
            patch.setattr(parser, name, raising(Parsed, after=getattr(parser, name)))
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")


@pytest.fixture
def restored() -> Iterator[None]:
    """What a command sets for its whole process is as it was after the test."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    terminated = signal.getsignal(signal.SIGTERM)
    with torch.enable_grad():
        yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, terminated)
    os.environ.clear()
    os.environ.update(environment)


def test_every_python_command_is_accepted_by_its_parser(restored: None) -> None:
    calls: dict[tuple[str, ...], str] = {}
    for each in COMMANDS:
        words = [STAND_IN.get(word, word) for word in each.words]
        if words[:1] == ["zeroprior"]:
            named = ZEROPRIOR[words[1]]
            module = named.function.partition(":")[0].removesuffix(".__main__")
            if "TOOL" in words or all(each.startswith("--") for each in words[2:]):
                continue  # named, not called
            words[:2] = ["python", "-m", module, *named.first]
        if words[:2] not in (["python", "-m"], ["accelerate", "launch"]) or reason(each):
            continue
        module, *arguments = words[words.index("-m") + 1 :]
        files = [name for name in arguments if name.startswith(("tests/", "configs/"))]
        assert all((ROOT / name).exists() for name in files), str(each)
        if module == "pytest" or (module == "trainer" and arguments in ([], ["plan"])):
            continue  # named, not called
        file = ROOT.joinpath(*module.split("."))
        file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
        if re.search("argparse|arguments_parser|Parser", file.read_text(encoding="utf-8")):
            calls[(module, *arguments)] = str(each)
        else:
            assert not arguments, str(each)
    refused = []
    for (module, *arguments), shown in calls.items():
        try:
            parse(module, arguments)
        except SystemExit as error:
            refused.append(f"{shown}: {error}")
    assert refused == []
    assert len(calls) > 50


def test_every_make_command_is_a_target_with_known_variables() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
    for each in COMMANDS:
        if each.words[0] == "make":
            target, *settings = each.words[1:]
            assert target in targets, str(each)
            assert {setting.partition("=")[0] for setting in settings} <= variables, str(each)


def inputs_of(words: tuple[str, ...], shapes: dict[str, Any]) -> dict[str, Any]:
    """The inputs that `cog` makes of its -i options: text, or a number where one is wanted."""
    given = [value for flag, value in zip(words, words[1:], strict=False) if flag == "-i"]
    found: dict[str, Any] = {}
    for each in given:
        name, _, value = each.partition("=")
        number = shapes.get(name, {}).get("type") in ("integer", "number")
        found[name] = json.loads(value) if number else value
    return found


def test_every_cog_command_has_the_inputs_of_the_schema() -> None:
    document = json.loads(schema.render())
    table = blocks_of_variables()
    seen = set()
    for each in COMMANDS:
        if each.words[0] != "cog" or reason(each) or each.words[1] == "exec":
            continue
        assert each.words[1] in ("run", "predict", "train"), str(each)
        component = "TrainingInput" if each.words[1] == "train" else "Input"
        inputs = Inputs(document, component)
        given = inputs_of(each.words, inputs.shapes)
        whole = {"prompt": "x"} | given if component == "Input" else given
        if given:
            inputs.check(whole)
            seen.add(each.words[1])
        for flag, value in zip(each.words, each.words[1:], strict=False):
            assert flag != "-e" or value.partition("=")[0] in table, str(each)
        # A path needs the permission to be read.
        source = str(given.get("replicate_weights", "@"))
        assert source.startswith("@") or "ZEROPRIOR_FILES=/src/outputs" in each.words, str(each)
    assert seen == {"run", "predict", "train"}


def blocks_of_variables() -> set[str]:
    """The environment variables that docs/serving.md documents."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    return set(re.findall(r"`([A-Z_]+)`", text))


def requests() -> list[tuple[Command, str, str, Any]]:
    """Every documented request: command, method, path, and its JSON body, if it is written out."""
    found = []
    for each in COMMANDS:
        if each.words[0] != "curl":
            continue
        url = next(word for word in each.words if word.startswith("http://"))
        options = dict(zip(each.words, each.words[1:], strict=False))
        body = options.get("-d")
        method = options.get("-X", "POST" if body else "GET")
        path = re.sub(r"^http://127\.0\.0\.1:\d+", "", url)
        found.append((each, method, path, json.loads(body) if body and body[0] == "{" else None))
    return found


def test_every_http_request_fits_the_schema() -> None:
    document = json.loads(schema.render())
    fleet = re.findall(r'@app\.\w+\("/(.*)"\)', (ROOT / "fleet/trainings.py").read_text("utf-8"))
    bodies = 0
    for command, method, path, body in requests():
        more = [f"/trainings/{each}" for each in fleet] if command.page == "docs/scale.md" else []
        known = [re.sub(r"\{\w+(:path)?\}", "[^/]+", each) for each in [*document["paths"], *more]]
        assert any(re.fullmatch(each, path) for each in known), str(command)
        assert method == "GET" or path.startswith(("/trainings", "/predictions")), str(command)
        if body is not None:
            component = "TrainingInput" if path == "/trainings" else "Input"
            Inputs(document, component).check(body["input"])
            bodies += 1
    assert bodies >= 3


def test_the_commands_around_requests_give_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset becomes a request, and each kind of reply becomes its files again."""
    monkeypatch.chdir(tmp_path)
    content = b"PK of a zip"
    url = "data:application/zip;base64," + base64.b64encode(content).decode()
    Path("imgs.zip").write_bytes(content)
    for name, reply in (
        ("weights", {"weights": url}),
        ("training.json", {"output": {"weights": url}}),
        ("prediction.json", {"output": [url, url]}),
    ):
        Path(name).write_text(json.dumps(reply))
    ran = 0
    for each in COMMANDS:
        if each.words[0] == "printf":
            subprocess.run(["bash", "-ec", each.text], check=True)
            sent = json.loads(Path("request.json").read_text())
            assert sent == {"input": {"dataset": url}}
        elif each.words[:2] == ("python", "-c"):
            exec(each.words[2], {})
            results = [p for n in ("weights.zip", "0.webp", "1.webp") if (p := Path(n)).exists()]
            assert results and all(path.read_bytes() == content for path in results)
            for path in results:
                path.unlink()
            ran += 1
    assert ran == 3


def test_the_python_of_the_readme_trains_and_generates(
    photos: Path, miniature_vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but for the base model and the number of steps."""
    monkeypatch.setenv("MODEL_VAULT", str(miniature_vault))
    monkeypatch.setenv("BASE_MODEL", "miniature-turbo")
    monkeypatch.chdir(tmp_path)
    Path("imgs.zip").write_bytes(photos.read_bytes())
    (code,) = blocks(ROOT / "README.md", "python")
    short = code.replace('"z-image-turbo"', '"miniature-turbo", steps=2')
    assert short != code
    names: dict[str, Any] = {}
    exec(short, names)
    assert Path(names["result"].weights).samefile("outputs/latest/weights.zip")
    (image,) = names["images"]
    assert image.suffix == ".webp" and image.stat().st_size > 0


def test_the_python_and_yaml_of_the_documents_can_be_read(tmp_path: Path) -> None:
    for page in PAGES:
        for code in blocks(page, "python"):
            compile(code, str(page), "exec")
        for text in blocks(page, "yaml"):
            file = tmp_path / "run.yaml"
            file.write_text(text)
            read_config(file, dataset="imgs.zip", base_model="miniature-turbo")
        for block in tokens(page):
            known = ("", "sh", "bash", "python", "yaml", "text", "json")
            assert block.type != "fence" or block.info.strip() in known, f"{page}: {block.info}"


@pytest.mark.slow
def test_the_commands_of_the_readme_train_and_generate(
    photos: Path, miniature_vault: Path, tmp_path: Path
) -> None:
    """As written, but for two steps of the miniature."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "imgs.zip").write_bytes(photos.read_bytes())
    for path in (ROOT / "configs").glob("*.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["base_model"] = "miniature-turbo"
        content["train"] |= {"steps": 2, "resolution": 64}
        (tmp_path / "configs" / path.name).write_text(yaml.dump(content))
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MODEL_VAULT": str(miniature_vault),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    small = {"z-image-turbo": "miniature-turbo", "800": "2"}
    ran = []
    for each in COMMANDS:
        named = each.words[0] == "zeroprior" and each.words[1] in ("plan", "train", "generate")
        if each.page == "README.md" and named:
            words = [small.get(word, word) for word in each.words]
            done = subprocess.run(
                [sys.executable, "-m", *words],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{each}\n{done.stderr}"
            ran.append(done.stdout)
    plan, trained, generated = ran
    assert "peak GB of a step" in plan
    assert "cog run -i replicate_weights=@outputs/" in trained.splitlines()[-1]
    assert (tmp_path / generated.splitlines()[-1]).is_file()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, miniature_vault: Path, photos: Path
) -> Iterator[CogServer]:
    folder = tmp_path_factory.mktemp("server")
    data = folder / "data"
    data.mkdir()
    (data / "imgs.zip").write_bytes(photos.read_bytes())
    environment = {
        "MODEL_VAULT": str(miniature_vault),
        "BASE_MODEL": "miniature-turbo",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ZEROPRIOR_FILES": str(data),
    }
    with CogServer("train", environment, copy_of_the_code(folder)) as running:
        yield running


@pytest.mark.slow
def test_the_training_request_of_the_readme_is_taken_by_a_real_server(server: CogServer) -> None:
    """As written, but for the base model, the number of steps, and the folder /data."""
    body = next(body for command, _, path, body in requests() if command.page == "README.md")
    name = Path(body["input"]["dataset"]).name
    short = {"dataset": name, "base_model": "miniature-turbo", "steps": 2, "resolution": "64"}
    reply = server.post("/trainings", {"input": body["input"] | short}).json()
    assert reply["status"] == "succeeded", reply
    assert reply["output"]["weights"].startswith("data:application/zip;base64,")
