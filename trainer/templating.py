"""Jinja environment for pages and the model card, with the files in the packages' `templates/`.

Values are never rendered as templates. In HTML and SVG every value is escaped. The functions that
escape Markdown and Python are in `trainer.result.model_card`.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

_HERE = Path(__file__).parent

TEMPLATES = Environment(
    loader=FileSystemLoader([_HERE / "result" / "templates", _HERE / "data" / "templates"]),
    autoescape=select_autoescape(("html", "svg")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
