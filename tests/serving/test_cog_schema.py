"""Cog's build-time parser and our generator read the same inputs from train.py and predict.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cog import BaseModel, Input, Secret
from cog import Path as CogPath
from root import ROOT

from serving import cog_yaml, schema

GOLDEN = ROOT / "tests" / "golden" / "openapi_schema.json"
REFEREE = ROOT.parent / "shared" / "tools" / "cog_schema_check.py"


class Trained(BaseModel):
    weights: CogPath
    note: str | None = None


def predict(prompt: str) -> list[CogPath]:
    raise NotImplementedError


def train(dataset: CogPath) -> Trained:
    raise NotImplementedError


def test_the_generated_schema_is_the_golden_one() -> None:
    assert json.loads(schema.render()) == json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.skipif(not REFEREE.exists(), reason=f"{REFEREE} is not on this machine")
def test_the_golden_schema_is_what_cogs_parser_reads_now() -> None:
    referee = subprocess.run(
        [sys.executable, REFEREE, ROOT], capture_output=True, text=True, check=False
    )
    assert referee.returncode == 0, referee.stderr
    assert json.loads(referee.stdout) == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_input_has_a_description() -> None:
    components = json.loads(schema.render())["components"]["schemas"]
    inputs = components["Input"]["properties"] | components["TrainingInput"]["properties"]
    assert [name for name, entry in inputs.items() if not entry.get("description")] == []


def test_an_input_may_be_left_out_when_it_has_a_default_or_may_be_null() -> None:
    def run(
        needed: int,
        never_null: int = Input(default=None),
        bare: int = 3,
        zero: float = Input(default=0.0, ge=0),
        maybe: int | None = Input(default=None),
        files: list[CogPath] = Input(default=[]),  # noqa: B008
        token: Secret | None = Input(default=None),  # noqa: B008
    ) -> str:
        raise NotImplementedError

    inputs, _ = schema.input_schema(run, "Input")
    assert inputs["required"] == ["needed", "never_null"]
    assert inputs["properties"]["bare"]["default"] == 3
    assert inputs["properties"]["zero"] == {
        "title": "Zero", "type": "number", "default": 0.0, "minimum": 0, "x-order": 3,
    }  # fmt: skip
    assert inputs["properties"]["maybe"] == {
        "title": "Maybe", "type": "integer", "default": None, "nullable": True, "x-order": 4,
    }  # fmt: skip
    assert inputs["properties"]["files"]["items"] == {"type": "string", "format": "uri"}
    assert inputs["properties"]["token"]["x-cog-secret"] is True


def test_a_trainings_optional_output_is_not_required() -> None:
    output = schema.output_schema(train)
    assert output["required"] == ["weights"]
    assert output["properties"]["note"] == {"title": "Note", "type": "string", "nullable": True}


def test_choices_that_differ_between_predict_and_train_are_refused() -> None:
    def draw(size: str = Input(default="a", choices=["a", "b"])) -> list[CogPath]:
        raise NotImplementedError

    def learn(size: str = Input(default="a", choices=["a", "c"])) -> Trained:
        raise NotImplementedError

    with pytest.raises(ValueError, match="train: .*'size'"):
        schema.document(draw, learn, "0")


def test_choices_under_a_name_of_cogs_own_are_refused() -> None:
    def draw(Status: str = Input(default="a", choices=["a", "b"])) -> list[CogPath]:
        raise NotImplementedError

    with pytest.raises(ValueError, match="'Status'"):
        schema.document(draw, train, "0")


@pytest.mark.parametrize("annotation", [Path, dict, int | str, list[list[int]]])
def test_a_type_that_cog_cannot_declare_is_named(annotation: object) -> None:
    def draw(odd: int) -> list[CogPath]:
        raise NotImplementedError

    draw.__annotations__["odd"] = annotation
    with pytest.raises(TypeError, match="input 'odd'"):
        schema.document(draw, train, "0")


def test_an_input_without_annotation_is_named() -> None:
    def draw(odd=1) -> list[CogPath]:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    with pytest.raises(TypeError, match="input 'odd'"):
        schema.document(draw, train, "0")


def test_the_schema_file_is_written_where_the_runtime_reads_it(tmp_path: Path) -> None:
    written = schema.write(tmp_path)
    assert written == tmp_path / ".cog" / "openapi_schema.json"
    assert json.loads(written.read_text(encoding="utf-8"))["openapi"] == "3.0.2"
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("path", ["predict.py", "train.py"])
def test_importing_a_face_does_not_import_torch(path: str) -> None:
    """Importing train.py is the setup of `cog train`, and the schema is written at every start."""
    module = path.removesuffix(".py")
    code = f"import {module}, sys; assert 'torch' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_installed_package_has_the_entry_points_of_cog_yaml(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_the_file = cog_yaml.read()
    monkeypatch.setattr(cog_yaml, "FILE", Path("cog.yaml-which-a-wheel-lacks"))
    assert cog_yaml.read()["build"].items() <= of_the_file["build"].items()
    assert {k: of_the_file[k] for k in ("predict", "train")} == cog_yaml.ENTRY_POINTS
    with cog_yaml.working_folder() as folder:
        assert (folder / "predict.py").read_text() == Path("predict.py").read_text()
        assert (folder / "train.py").is_file()
    assert not folder.exists()
