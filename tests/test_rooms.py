"""Imports: only downwards, never in a circle, and light at the entry points."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from root import ROOT

BELOW_ENTRY_POINTS = {"trainer", "inference", "adapters", "families"}

# Each package and entry point, and what it may import of the others. A new one gets its row here.
MAY_IMPORT: dict[str, set[str]] = {
    "charts": set(),
    "families": set(),
    "adapters": {"families", "charts"},
    "inference": {"adapters", "families"},
    "trainer": {"inference", "adapters", "families", "charts"},
    # Loads train.py and predict.py by name, to read which inputs they declare.
    "serving": {"families", "adapters", "inference"},
    "miniature": {"families"},
    # Its server never imports PyTorch.
    "studio": BELOW_ENTRY_POINTS,
    "train": BELOW_ENTRY_POINTS | {"serving"},
    "predict": BELOW_ENTRY_POINTS - {"trainer"} | {"serving"},
    "demo": BELOW_ENTRY_POINTS | {"miniature", "train", "predict"},
    "zeroprior": BELOW_ENTRY_POINTS | {"studio"},  # its table names the other entry points as text
    "lab": BELOW_ENTRY_POINTS | {"miniature", "demo"},
}

# Inner packages, and what each may import of the same package; files without an inner package
# stand for themselves. Of another package only what its `__init__` names, except tests and lab.
ROOT_FILES = {
    *("outputs", "lock", "run_files", "encodings", "events", "inbox", "state", "templating"),
    "dataset_names",
}
INNER: dict[str, dict[str, set[str]]] = {
    "trainer": {
        "settings": ROOT_FILES,
        "data": ROOT_FILES | {"settings"},
        "captions": ROOT_FILES | {"settings", "data"},
        "learning": ROOT_FILES | {"settings", "data"},
        "memory": ROOT_FILES | {"settings", "data", "learning"},
        "monitor": ROOT_FILES | {"settings", "data", "learning"},
        "result": ROOT_FILES | {"settings", "data", "learning", "memory", "monitor"},
    },
    "inference": {"fetch": set()},
    "adapters": {
        "files": set(),
        "formats": {"files"},
        "tools": {"files", "formats", "archive", "archive_opening", "baked", "comfyui"}
        | {"archive_members", "placeholder", "placeholder_token", "trained_model", "turbo"},
    },
    # One file for each base model. All else asks `families.registry`.
    "families": {
        "models": {"base", "family", "video_vae", "editing", "references", "block_causal"}
        | {"tiles", "tokens", "transfer"}
    },
}
OPEN = {"adapters.files"}  # without a face: four files that everything above uses directly


def files(package: str) -> list[Path]:
    entry_point = ROOT / f"{package}.py"
    return [entry_point] if entry_point.is_file() else sorted((ROOT / package).rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import in a file, those inside functions too.

    `from a import b` is a.b where that is a module, and a where it is not.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: relative imports are not used here"
            for alias in node.names:
                yield node.lineno, module_of(f"{node.module}.{alias.name}") or str(node.module)


@cache
def module_of(name: str) -> str | None:
    path = ROOT / name.replace(".", "/")
    return name if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() else None


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_packages_below_it(package: str) -> None:
    wrong = []
    for file in files(package):
        for line, name in imported(file):
            other = name.split(".")[0]
            if other in MAY_IMPORT and other != package and other not in MAY_IMPORT[package]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "inner"), [(package, inner) for package, rows in INNER.items() for inner in rows]
)
def test_an_inner_package_imports_only_inner_packages_below_it(package: str, inner: str) -> None:
    allowed, wrong = INNER[package][inner], []
    for file in files(f"{package}/{inner}"):
        for line, name in imported(file):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] not in allowed | {inner}:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_every_inner_package_has_its_place() -> None:
    for package, rows in INNER.items():
        found = {each.parent.name for each in (ROOT / package).glob("*/__init__.py")}
        assert found == set(rows)


@pytest.mark.parametrize("package", sorted(set(MAY_IMPORT) - {"lab"}))
def test_what_is_used_of_an_inner_package_is_named_by_it(package: str) -> None:
    """And its own files import each other directly, not through the name of the package."""
    faces = {f"{p}.{inner}" for p, rows in INNER.items() for inner in rows} - OPEN
    wrong = []
    for file in files(package):
        inside = next((face for face in faces if f"{name_of(file)}.".startswith(f"{face}.")), None)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            name = str(node.module)
            face = next((each for each in faces if f"{name}.".startswith(f"{each}.")), None)
            if face is None:
                continue
            through = name == face
            modules = through and all(module_of(f"{name}.{each.name}") for each in node.names)
            if through == (face == inside) and not modules:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Imports for the type checker alone do not count."""
    arrows = {name_of(file): set(loaded(file)) for file in files(package)}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for other in sorted(arrows.get(name, ())):
                walk(other, (*path, name))
            done.add(name)

    for each in arrows:
        walk(each, ())


def loaded(file: Path) -> Iterator[str]:
    """The modules that a file loads when it is imported."""
    nodes = list(ast.parse(file.read_text(encoding="utf-8")).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield module_of(f"{node.module}.{alias.name}") or str(node.module)


def test_every_package_has_its_place() -> None:
    packages = {init.parent.name for init in ROOT.glob("[!.]*/__init__.py")} - {"tests"}
    assert packages <= set(MAY_IMPORT)
    assert {each.stem for each in ROOT.glob("*.py")} <= set(MAY_IMPORT)
    assert all(files(package) for package in MAY_IMPORT)


@pytest.mark.parametrize("package", sorted(set(MAY_IMPORT) - {"lab", "miniature"}))
def test_no_file_is_too_long_to_read(package: str) -> None:
    """The benchmarks', the miniature's and the tests' tables may be longer."""
    long = {file.name: len(file.read_text().splitlines()) for file in files(package)}
    assert {name: lines for name, lines in long.items() if lines > 350} == {}


HEAVY = ("torch", "diffusers", "transformers", "peft", "numpy")


def heavy_after(program: str) -> list[str]:
    """Which of the heavy libraries a program has imported."""
    program += f"; import sys; print(*[m for m in {HEAVY + ('PIL',)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_the_entry_points_are_imported_without_the_heavy_libraries() -> None:
    """Cog imports them to read the inputs, and to start; what is heavy waits for its use."""
    assert heavy_after("import train, predict") == []


@pytest.mark.parametrize("command", ["trainer", "inference", "adapters"])
def test_a_command_line_is_read_without_the_heavy_libraries(command: str) -> None:
    """So --help comes at once, and what is wrong with the arguments."""
    found = heavy_after(f"import {command}.__main__ as it; it.arguments_parser().format_help()")
    assert not set(found) & set(HEAVY)


def test_the_base_models_are_known_without_the_heavy_libraries() -> None:
    """Each is a file with its settings and its class; the class imports PyTorch when it is used."""
    assert heavy_after("from families.registry import BASES; assert len(BASES) > 6") == []


@pytest.mark.parametrize("package", ["families", "adapters", "inference", "trainer", "serving"])
def test_only_the_file_of_a_base_model_names_it(package: str) -> None:
    """Another place that needs to know a base model asks its family."""
    from families.registry import FAMILIES

    names = {name for family in FAMILIES.values() for name in (family.name, family.title)}
    names |= {name for family in FAMILIES.values() for name in vars(family.classes).values()}
    names |= {n for family in FAMILIES.values() for b in family.bases for n in (b.name, b.hub_id)}
    names.discard("")  # a family without editing models
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno} names {node.value}"
        for file in files(package)
        if file.parent != ROOT / "families" / "models"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert wrong == []


def test_settings_and_data_are_imported_without_pytorch() -> None:
    """A page that checks a dataset needs neither its second nor its memory."""
    assert "torch" not in heavy_after("import trainer.settings, trainer.data")


def test_settings_are_resolved_and_a_dataset_is_read_without_pytorch() -> None:
    program = (
        "from pathlib import Path; from trainer.data import read_dataset; "
        "from trainer.settings import TrainingInputs, read_config, resolve; "
        "inputs = TrainingInputs(dataset=Path('demo/subject.zip'), base_model='z-image-turbo'); "
        "settings = resolve(inputs); read_config('configs/z_image_turbo.yaml', dataset='x'); "
        "read_dataset(settings.dataset, settings.default_caption, settings.subject, '', '', False)"
    )
    assert "torch" not in heavy_after(program)
