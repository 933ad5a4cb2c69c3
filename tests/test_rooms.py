"""Imports run downwards only, as the rooms are laid out; and the Cog faces are quick to import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BELOW_FACES = {"trainer", "inference", "adapters", "families"}

# Each room and face, and what it may import of the others. A new room gets its row here.
MAY_IMPORT: dict[str, set[str]] = {
    "families": set(),
    "adapters": {"families"},
    "inference": {"adapters", "families"},
    "trainer": {"inference", "adapters", "families"},
    "serving": {"families", "inference"},  # and reads the faces by name, to see what they declare
    "miniature": {"families"},
    "fuzz": {"trainer", "adapters", "families"},
    "train": BELOW_FACES | {"serving"},
    "predict": BELOW_FACES - {"trainer"} | {"serving"},
    "demo": BELOW_FACES | {"miniature", "train", "predict"},  # uses the faces as a user does
    "experiments": BELOW_FACES | {"miniature", "demo"},
    "benchmarks": BELOW_FACES | {"miniature", "experiments"},
}


def files(room: str) -> list[Path]:
    face = ROOT / f"{room}.py"
    return [face] if face.is_file() else sorted((ROOT / room).rglob("*.py"))


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import in a file, those inside functions too."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join((*above, *filter(None, [node.module])))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    wrong = []
    for file in files(room):
        for line, name in imported(file):
            other = name.split(".")[0]
            if other in MAY_IMPORT and other != room and other not in MAY_IMPORT[room]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_every_room_has_its_place() -> None:
    packages = {init.parent.name for init in ROOT.glob("[!.]*/__init__.py")} - {"tests"}
    assert packages <= set(MAY_IMPORT)
    assert {face.stem for face in ROOT.glob("*.py")} <= set(MAY_IMPORT)
    assert all(files(room) for room in MAY_IMPORT)


HEAVY = ("torch", "diffusers", "transformers", "peft", "numpy")


def heavy_after(program: str) -> list[str]:
    """Which of the heavy libraries a program has imported."""
    program += f"; import sys; print(*[m for m in {HEAVY + ('PIL',)} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_the_faces_are_imported_without_the_heavy_libraries() -> None:
    """Cog imports them to read the inputs, and to start; what is heavy waits for its use."""
    assert heavy_after("import train, predict") == []


@pytest.mark.parametrize("command", ["trainer", "inference"])
def test_a_command_line_is_read_without_the_heavy_libraries(command: str) -> None:
    """So --help comes at once, and what is wrong with the arguments."""
    found = heavy_after(f"import {command}.__main__ as it; it.arguments_parser().format_help()")
    assert not set(found) & set(HEAVY)
