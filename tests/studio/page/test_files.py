"""The page's files: their weight, what is vendored, and what they must not do."""

import hashlib
import re

import pytest
from root import ROOT

PAGE = ROOT / "studio/page"
OWN = sorted((*PAGE.glob("*.js"), *PAGE.glob("*.css"), *PAGE.glob("*.html")))
# uPlot 1.6.32, MIT, never edited.
VENDORED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


@pytest.mark.parametrize("screen", ["datasets", "train", "runs", "generate", "weights"])
def test_a_screen_with_all_that_it_loads_is_below_300_kb(screen: str) -> None:
    index = (PAGE / "index.html").read_text()
    files = {"index.html", *re.findall(r'(?:href|src)="([\w./-]+\.(?:svg|css|js))"', index)}
    wanted = [f"{screen}.js", "main.js"]
    while wanted:
        name = wanted.pop()
        files.add(name)
        found = set(re.findall(r'(?:from |import\()"\./([\w.]+)"', (PAGE / name).read_text()))
        screens = {f"{each}.js" for each in ("datasets", "train", "runs", "generate", "weights")}
        wanted += found - files - (screens if name == "main.js" else set())
    assert {"style.css", "vendor/uPlot.iife.min.js", "core.js", "dom.js"} <= files
    assert sum((PAGE / each).stat().st_size for each in files) < 300_000


@pytest.mark.parametrize("name", VENDORED)
def test_vendored_files_are_as_published(name: str) -> None:
    content = (PAGE / "vendor" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == VENDORED[name]
    assert (PAGE / "vendor/LICENSE").is_file()


def test_no_file_parses_html_or_leaves_the_machine() -> None:
    for each in OWN:
        text = each.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"""(?:src|href|import|fetch)[=( ]*["'`]https?:""", text), each.name
        assert each.suffix != ".html" or not re.search(r"<script>|<style| style=| on\w+=", text)


@pytest.mark.parametrize("file", OWN, ids=lambda each: each.name)
def test_imports_name_what_their_files_export(file: object) -> None:
    text = file.read_text()  # type: ignore[attr-defined]
    for names, source in re.findall(r"import \{([^}]+)\} from \"\./([\w.]+)\"", text):
        exported = (PAGE / source).read_text()
        for name in (each.strip() for each in names.split(",")):
            assert re.search(rf"export (?:async )?(?:const|function|class) {name}\b", exported)
            assert len(re.findall(rf"\b{name}\b", text)) > 1, f"{name} is imported but not used"
