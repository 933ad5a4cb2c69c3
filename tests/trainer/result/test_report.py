"""The report tells the training's story on one page that loads nothing and trusts nobody."""

import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from charts import Line, chart, smoothed, thinned, ticks
from trainer.data.dataset import Example
from trainer.monitor.validation import Curves
from trainer.result.report import FRAMES, IMAGES, ReportData, page
from trainer.result.result_checks import FAILED, PASSED, CheckResult

HOSTILE = "\"><script>alert(1)</script><img src=x onerror='alert(2)'> & <zwx>"


class Page(HTMLParser):
    """Every element and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def picture(name: str, caption: str, edge: int = 48) -> Example:
    encoded = io.BytesIO()
    Image.new("RGB", (edge, edge), (200, 90, 40)).save(encoded, format="png")
    return Example(name, caption, edge, edge, encoded.getvalue())


@pytest.fixture
def report_data() -> ReportData:
    meta: dict[str, Any] = {
        "base_model": "zeroprior/miniature-turbo",
        "placeholder_token": "<zwx>",
        "rank": 4,
        "steps": 3,
        "settings": {"seed": 7, "preset": None, "learning_rate": 1e-4, "sample_options": {}},
        "training": {"device": "cpu", "loss_last": 0.5, "steps_per_second": 2.0},
        "versions": {"torch": "2"},
    }
    return ReportData(
        meta,
        [picture("a.png", "a photo of <zwx>"), picture("b.png", "<zwx> at sea")],
        [1.0, 0.8, 0.6],
        Curves([0.2, 0.8], ["b.png"], [0, 2, 3], [[1.0, 2.0], [0.9, 1.0], [0.5, 0.9]]),
        ["<zwx> in snow"],
        {step: [Image.new("RGB", (64, 64), (step, 0, 0))] for step in (0, 3)},
        [
            CheckResult("the file can be read back", PASSED, "bit for bit"),
            CheckResult("drift", FAILED, "far"),
        ],
    )


def test_the_page_holds_the_whole_story(report_data: ReportData) -> None:
    text = Page(page(report_data)).text
    for part in (
        *(
            "<zwx> on zeroprior/miniature-turbo",
            "broken: 1 checks passed, 1 failed",
            "the file can be read back",
        ),
        *("bit for bit", "a photo of <zwx>", "b.png", "held out", "<zwx> in snow", "before"),
        *("step 3", "learning rate", "0.0001", "−53.3 %", "torch 2"),
    ):
        assert part in text, part
    passed = replace(report_data, checks=report_data.checks[:1])
    assert "good: 1 checks passed, 0 failed, 0 skipped" in Page(page(passed)).text


def test_without_held_out_images_the_curve_is_called_fit(report_data: ReportData) -> None:
    assert "Validation loss" in Page(page(report_data)).text
    fit = Page(page(replace(report_data, curves=replace(report_data.curves, held_out=[])))).text
    assert "Validation loss" not in fit and "not validated: no image was held out" in fit
    assert "Fit: loss on training images" in fit


HOSTILES = [
    HOSTILE,
    *("<!-- <zwx>", "--> ]]> <zwx>", "</main></body></html><zwx>", "</style><zwx>", "<zwx>`|`---"),
    *(f"<zwx>{end}</title>{end}<h1>x</h1>" for end in ("\n", "\u2028", "\x85", "\x0b", "\x1c")),
    *("<svg/onload=x>", "&lt;b&gt; &#60; &amp", "{0} %s <zwx>", "'\u202e<zwx>\""),
    *("{{ 7 * 7 }} {{ meta }} <zwx>", "{% include 'report.css' %} {# <zwx>"),
]


def told_of(report_data: ReportData, text: str) -> ReportData:
    """A report in which everything that may come from outside is this text."""
    meta = dict(report_data.meta) | {"placeholder_token": text, "base_model": text}
    meta["settings"] = {text: text, "sample_options": {text: [text]}}
    return ReportData(
        meta,
        [picture(text, text)],
        report_data.losses,
        replace(report_data.curves, held_out=[text]),
        [text],
        report_data.previews,
        [CheckResult(text, FAILED, text)],
    )


@pytest.mark.parametrize("text", HOSTILES, ids=ascii)
def test_hostile_text_stays_text(text: str, report_data: ReportData) -> None:
    parsed = Page(page(told_of(report_data, text)))
    harmless = Page(page(told_of(report_data, "x")))
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in harmless.elements]
    assert not {"script", "iframe", "link", "base", "form"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/webp;base64,")
    assert parsed.text.count(text) >= 8  # shown as it was written


def test_previews_without_the_token_say_that_the_lora_is_applied(report_data: ReportData) -> None:
    said = "apply_lora: always"
    assert said not in Page(page(report_data)).text
    without = replace(report_data, prompts=["a cat"])
    assert said in Page(page(without)).text
    style = replace(without, meta=dict(report_data.meta) | {"placeholder_token": None})
    assert said not in Page(page(style)).text  # a LoRA without a token is always applied


def test_the_page_asks_the_network_for_nothing(report_data: ReportData) -> None:
    text = page(report_data)
    parsed = Page(text)
    policy = next(a for t, a in parsed.elements if t == "meta" and "http-equiv" in a)
    assert str(policy["content"]).startswith("default-src 'none'")
    assert not re.search(r"https?:|@import|url\(", text)
    assert {a["src"].split(",")[0] for t, a in parsed.elements if a.get("src")} == {  # type: ignore[union-attr]
        "data:image/webp;base64"
    }


def test_a_large_dataset_and_many_previews_leave_the_page_small(report_data: ReportData) -> None:
    many = replace(
        report_data,
        examples=[picture(f"{k}.png", "x", 600) for k in range(IMAGES + 20)],
        previews={k: report_data.previews[0] for k in range(100)},
    )
    parsed = Page(page(many))
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(images) == IMAGES + FRAMES
    assert f"first {IMAGES} of {IMAGES + 20} images" in parsed.text
    assert "before" in parsed.text
    assert "step 99" in parsed.text
    assert max(int(str(each["width"])) for each in images) <= 256


def test_a_training_without_curves_and_previews_has_a_report_too(report_data: ReportData) -> None:
    bare = replace(
        report_data, curves=Curves([0.2], [], [], []), losses=[1.0], previews={}, checks=[]
    )
    text = Page(page(bare)).text
    assert "Dataset" in text
    assert "Curves" not in text


def test_a_chart_is_sound_svg_whatever_its_numbers() -> None:
    for points in ([(0, 1.0)], [(0, 0.0), (5, 0.0)], [(0, 1e-9), (1e5, 3e-9)], [(0, -5), (9, 7)]):
        svg = ET.fromstring(chart([Line(points, "main", "a & b", True)], "step", "<title>"))
        for element in svg.iter():
            for name in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy"):
                assert -1 <= float(element.get(name, 0)) <= 500
    assert chart([Line([], "main")], "step", "nothing") == ""


def test_the_axes_carry_round_numbers() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-85.1, 0, 5) == [-100, -80, -60, -40, -20, 0]
    assert ticks(3, 3, 5)[0] <= 3 <= ticks(3, 3, 5)[-1]


def test_smoothing_is_a_mean_that_does_not_lag_at_the_start() -> None:
    assert smoothed([4.0] * 50, 10) == pytest.approx([4.0] * 50)
    assert smoothed([1.0, 2.0, 3.0], 1) == [1.0, 2.0, 3.0]
    points = [(float(k), float(k % 2)) for k in range(4001)]
    short = thinned(points)
    assert len(short) <= 400
    assert sum(y for _, y in short[:-1]) / len(short[:-1]) == pytest.approx(0.5, abs=0.05)
