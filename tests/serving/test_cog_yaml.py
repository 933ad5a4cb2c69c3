"""cog.yaml and requirements.txt say what Cog understands: it ignores unknown keys in silence."""

import ast
import re
from fnmatch import fnmatch

import pytest
from root import ROOT

from serving import cog_yaml

CONFIG = cog_yaml.read()
BUILD = CONFIG["build"]

KEYS = {
    "build", "image", "model", "run", "predict", "train", "concurrency", "environment", "weights",
}  # fmt: skip
BUILD_KEYS = {
    "gpu", "cuda", "cudnn", "python_version", "python_requirements", "system_packages", "run",
    "sdk_version",
}  # fmt: skip
# Variables (or beginnings of their names) that Cog refuses to set.
REFUSED_VARIABLES = [
    "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONUNBUFFERED", "LIBRARY_PATH",
    "R8_*", "REPLICATE_*", "CUDA_*", "NVIDIA_*", "NV_*", "PGET_*", "KUBERNETES_*",
    "HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER",
]  # fmt: skip
# The CUDA versions for which Cog knows a build of torch.
CUDA_OF_TORCH = {
    "2.6.0": {"11.8", "12.4", "12.6"},
    "2.7.0": {"11.8", "12.6", "12.8"},
    "2.8.0": {"12.6", "12.8", "12.9"},
    "2.9.1": {"12.6", "12.8", "13.0"},
    "2.10.0": {"12.6", "12.8", "13.0"},
    "2.11.0": {"12.6", "12.8", "12.9", "13.0"},
}


def requirement_lines() -> list[str]:
    text = (ROOT / BUILD["python_requirements"]).read_text(encoding="utf-8")
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def pins() -> dict[str, str]:
    return dict(line.lower().split("==") for line in requirement_lines())


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the repository's root folder out of the image."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.strip().rstrip("/") for line in lines if line and not line.startswith("#")]
    return any(fnmatch(path, pattern) for pattern in patterns)


def test_cog_knows_every_key() -> None:
    assert set(CONFIG) <= KEYS
    assert set(BUILD) <= BUILD_KEYS


def test_the_image_has_a_gpu_and_a_python_that_cog_builds() -> None:
    assert BUILD["gpu"] is True
    assert BUILD["python_version"] in {"3.10", "3.11", "3.12", "3.13"}


def test_versions_in_cog_yaml_are_text() -> None:
    """Unquoted, YAML reads 3.10 as the number 3.1 and 12.80 as 12.8."""
    assert all(isinstance(BUILD[key], str) for key in ("cuda", "python_version", "sdk_version"))


def test_the_version_of_cog_is_exact_and_reads_schemas_without_running_the_model() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", BUILD["sdk_version"])
    assert tuple(map(int, BUILD["sdk_version"].split("."))) >= (0, 17, 0)


def test_every_requirement_is_one_exact_pin() -> None:
    """A dotted name would lose its first half in Cog's rewriting of the file."""
    assert [r for r in requirement_lines() if not re.fullmatch(r"[\w-]+==\d+(\.\w+)+", r)] == []


def test_cog_is_not_pinned_twice() -> None:
    assert {"cog", "coglet"}.isdisjoint(pins())


def test_cog_has_a_build_of_torch_for_the_cuda_version() -> None:
    assert BUILD["cuda"] in CUDA_OF_TORCH[pins()["torch"]]


def test_cog_may_set_every_environment_variable() -> None:
    names = [entry.split("=", 1)[0] for entry in CONFIG["environment"]]
    assert [n for n in names if any(fnmatch(n, refused) for refused in REFUSED_VARIABLES)] == []


@pytest.mark.parametrize("entry", ["predict", "train"])
def test_the_entry_points_are_defined_in_the_files_named(entry: str) -> None:
    """Cog does not follow imports from there."""
    file, name = CONFIG[entry].split(":")
    kind = ast.ClassDef if entry == "predict" else ast.FunctionDef
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in [node.name for node in body if isinstance(node, kind)]


def test_what_the_model_needs_is_not_kept_out_of_the_image() -> None:
    not_needed = {"tests", "benchmarks", "experiments", "fuzz"}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - not_needed
    entries = [CONFIG[entry].split(":")[0] for entry in ("predict", "train")]
    needed = [".cog", "cog.yaml", BUILD["python_requirements"], *entries, *packages]
    assert [path for path in needed if ignored(path)] == []
    assert ignored(".git") and ignored("tests")
