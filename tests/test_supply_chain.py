"""No code comes from a model's repository or a pickle, and every package has its version."""

import ast
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from root import ROOT

from families.components import load_vision_encoder
from families.family import Family
from families.loading import load_family
from families.registry import BASES
from families.repository import MissingModel

SHIPPED = sorted(
    file
    for room in (
        "families",
        "adapters",
        "inference",
        "trainer",
        "serving",
        "fleet",
        "miniature",
        "demo",
        "charts",
    )
    for file in (ROOT / room).rglob("*.py")
) + [ROOT / "train.py", ROOT / "predict.py"]

# What runs code that lies in data, or in a shell. `torch.load` may with weights_only=True.
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "torch.jit.load"),
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
REQUIRED = {"torch.load": {"weights_only": True}}  # an argument that has to be given
AUTO = {"AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained"}
ONLY = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "use_safetensors": True}


def faults(source: str) -> Iterator[str]:
    """What in a module's source would run somebody else's code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0]]
        else:
            names = []
        yield from (f"{node.lineno}: imports {name}" for name in names if name in FORBIDDEN_IMPORTS)  # type: ignore[attr-defined]
        if isinstance(node, ast.Dict):
            given = {
                k.value: v
                for k, v in zip(node.keys, node.values, strict=True)
                if isinstance(k, ast.Constant)
            }
        elif isinstance(node, ast.Call):
            given = {each.arg: each.value for each in node.keywords if each.arg}
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                yield f"{node.lineno}: calls {called}"
            required = dict(REQUIRED.get(called, {}))
            if called in AUTO or called.startswith("AutoModel"):
                required["trust_remote_code"] = False
            for name in required.keys() - given.keys():
                yield f"{node.lineno}: {called} without {name}"
        else:
            continue
        for name, value in ({"weights_only": True} | ONLY).items():
            if name in given and not _is(given[name], value):
                yield f"{node.lineno}: {name} is not {value}"


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_runs_code_that_comes_as_data(file: Path) -> None:
    assert [*faults(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "np.load(file, allow_pickle=True)",
        "model.from_pretrained(folder, use_safetensors=False)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "yaml.load(text)",
    ],
)
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert [*faults(source)]


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-dev.txt", "requirements-fleet.txt"]
)
def test_every_package_has_its_exact_version(name: str) -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    exact = re.compile(r"[\w.-]+(\[\w+\])?==\d[\w.]*")
    wrong = [line for line in lines if line and not exact.fullmatch(line)]
    assert wrong == []


# ---- A model's repository that means harm --------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Exists as soon as code of the repository has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def repository(vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base's folder in a vault of its own, to be tampered with."""
    copied = tmp_path / "vault" / BASES["z-image"].hub_id
    shutil.copytree(vault / BASES["z-image"].hub_id, copied, copy_function=os.link)
    monkeypatch.setenv("MODEL_VAULT", str(tmp_path / "vault"))
    return copied


def load_all() -> Family:
    family = load_family(BASES["z-image"], torch.device("cpu"), torch.float32)
    assert family.prompts and family.text_width
    assert family.transformer and family.text_encoder and family.vae
    return family


def change(file: Path, **values: object) -> None:
    content = json.loads(file.read_text()) | values
    file.unlink()  # a link to the vault's own
    file.write_text(json.dumps(content))


def test_code_beside_a_model_is_never_run(repository: Path, mark: Path) -> None:
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    classes = ("Config", "Model", "Tokenizer")
    for folder in ("transformer", "text_encoder", "tokenizer", "vae"):
        for module in ("evil", "modeling", "configuration", "tokenization", "__init__", "pipeline"):
            source = code + "".join(f"class Evil{each}: pass\n" for each in classes)
            (repository / folder / f"{module}.py").write_text(source)
    for folder in ("transformer", "text_encoder", "vae"):
        auto = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
        change(repository / folder / "config.json", auto_map=auto)
    auto = {"AutoTokenizer": ["evil.EvilTokenizer", None]}
    change(repository / "tokenizer" / "tokenizer_config.json", auto_map=auto)
    index = {"_class_name": ["pipeline", "EvilPipeline"], "vae": ["evil", "EvilModel"]}
    change(repository / "model_index.json", **index)
    load_all()
    assert not mark.exists()


def test_a_kind_that_only_the_repository_knows_is_not_looked_up_in_its_code(
    repository: Path, mark: Path
) -> None:
    (repository / "text_encoder" / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    auto = {"AutoConfig": "evil.EvilConfig"}
    change(repository / "text_encoder" / "config.json", model_type="evil", auto_map=auto)
    family = load_all()  # by the classes of the family
    with pytest.raises((ValueError, OSError)):
        load_vision_encoder(family)  # by its config
    assert not mark.exists()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("transformer", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ],
)
def test_a_pickle_in_place_of_weights_is_refused_unread(
    repository: Path, mark: Path, folder: str, name: str
) -> None:
    for file in (repository / folder).glob("*.safetensors*"):
        file.unlink()
    (repository / folder / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(MissingModel, match=f"{folder} lacks .*safetensors"):
        load_all()
    assert not mark.exists()


def test_a_pickle_by_the_name_of_safetensors_is_refused_unread(
    repository: Path, mark: Path
) -> None:
    (file,) = (repository / "vae").glob("*.safetensors")
    file.unlink()
    file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(Exception, match="(?i)safetensors|header|state dict|checkpoint"):
        load_all()
    assert not mark.exists()


def test_the_payload_would_show(mark: Path) -> None:
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 20 and named <= there
