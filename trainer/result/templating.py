"""Jinja environment for the report and the model card, with the files in `templates/`.

Values are never rendered as templates. In HTML and SVG every value is escaped. The functions that
escape Markdown and Python are in `trainer.result.model_card`.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=select_autoescape(("html", "svg")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
