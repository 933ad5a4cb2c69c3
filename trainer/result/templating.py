"""The templates of the report and of the model card, files in `templates/`.

Values are text for a template, never a template. In HTML and SVG every value is escaped. Markdown
and Python have filters of their own, in `trainer.result.model_card`.
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
