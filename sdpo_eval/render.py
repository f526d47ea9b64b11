"""Blocks into text: a page, Markdown, JSON. What comes from data is made harmless here, once for all.

Nothing from data is trusted: it is escaped, its hidden characters are made visible, and it is cut
where it is very long. Only our own templates, style and script go into the page as they are.
"""

import base64
import functools
import hashlib
import json
import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sdpo_eval.blocks import LONGEST_CELL, Drawing, Estimate, Section, write_number

TEMPLATES = Path(__file__).parent / "templates"
LONGEST_ANSWER = 1200  # characters shown of a prompt or an answer
LONGEST_VALUE = 4_000  # characters of a text in JSON
LONGEST_TEXT = 40_000  # characters shown of anything
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e01ef]"
)
"""Characters that show nothing, or reorder what stands beside them. Not the joiners U+200C and
U+200D, which Persian, Hindi and emoji need."""
MARKDOWN = re.compile(r"([\\`*_\[\]{}|#~$])")


def render_html(name: str, summary: str, sections: list[Section]) -> str:
    """Write the whole page: style, script and figures inside, nothing to load.

    Its content security policy allows this very script and no other, and no request at all.
    """
    style, script = _file("report.css"), f"{_vega()}\n{_file('report.js')}"
    return (
        _environment(html=True)
        .get_template("report.html.jinja")
        .render(
            name=name,
            summary=summary,
            sections=sections,
            style=Markup(style),  # noqa: S704 - our own files, nobody's data
            script=Markup(script),  # noqa: S704
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def render_markdown(name: str, summary: str, sections: list[Section]) -> str:
    """Write the report as Markdown, without its figures."""
    return (
        _environment(html=False).get_template("report.md.jinja").render(name=name, summary=summary, sections=sections)
    )


def visible(text: str, most: int = LONGEST_TEXT) -> str:
    """Show hidden and reordering characters as ⟨U+202E⟩, and say how much of a long text is cut."""
    cut = len(text) - most
    text = HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text[:most].replace("\r\n", "\n"))
    return f"{text}… ({cut:,} more characters)" if cut > 0 else text


def shown_answer(text: str) -> str:
    """Shorten a prompt or an answer, which may be as long as its author liked."""
    return visible(text, LONGEST_ANSWER)


def shown(cell: Any) -> str:
    """Write a table's cell as a person reads it."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "–"
    if isinstance(cell, float):
        return write_number(cell)
    return f"{cell:,}".replace("-", "−") if isinstance(cell, int) else visible(str(cell), LONGEST_CELL)


def sorted_by(cell: Any) -> float | str:
    """Give the number that a cell is sorted by; nothing where it is no number."""
    number = cell.value if isinstance(cell, Estimate) else cell
    return number if isinstance(number, int | float) and math.isfinite(number) else ""


def plain(value: Any, most: int = LONGEST_TEXT) -> Any:
    """Make what JSON can hold: dataclasses as objects, numbers that are none as null, strings visible."""
    if isinstance(value, Estimate):
        ends = {} if value.ends is None else dict(zip(("low", "high"), value.ends, strict=True))
        return plain({"value": value.value, "stderr": value.stderr, "n": value.n} | ends, most)
    if is_dataclass(value):
        return {item.name: plain(getattr(value, item.name), most) for item in fields(value)}
    if isinstance(value, dict):
        return {visible(str(key), most): plain(item, most) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, most) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return visible(value, most) if isinstance(value, str) else value


@functools.cache
def _environment(*, html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,  # noqa: S701 - Markdown has an escape of its own, _as_markdown
        finalize=_as_html if html else _as_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for filter_ in (shown, shown_answer, sorted_by, fenced, unbroken, head, spec):
        environment.filters[filter_.__name__] = filter_
    return environment


def _as_html(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _as_markdown(value: Any) -> Any:
    """Keep a value on its line and free of Markdown and HTML of its own."""
    if isinstance(value, Markup):
        return value
    text = MARKDOWN.sub(r"\\\1", visible(str(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return " ".join(text.split("\n"))


def fenced(text: str) -> Markup:
    """Quote text as code, within a fence longer than any in the text."""
    text = visible(text)
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
    return Markup(f"{fence}text\n{text}\n{fence}")  # noqa: S704 - a fence holds no markup


def head(column: str, units: dict[str, str]) -> str:
    unit = units.get(column)
    return column.replace("_", " ") + (f" [{unit}]" if unit else "")


def unbroken(text: str) -> str:
    """Keep a number and its error, or an interval's ends, on one line."""
    text = re.sub(r" ([±×=]) ", "\u00a0\\1\u00a0", text)
    return re.sub(r"(\[[−+]?[\d.,]+,) ", "\\1\u00a0", text)


def spec(drawing: Drawing) -> dict[str, Any]:
    """Take a chart apart: its title and subtitle, and the rest as JSON that may stand in a script element."""
    chart = plain(drawing.draw().to_dict(validate=False), LONGEST_CELL)  # tests validate; it takes as long as the rest
    title = chart.pop("title")
    del chart["$schema"]  # an address, and the page is to name none
    text = json.dumps(chart, allow_nan=False)  # ASCII only
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return {"title": title["text"], "subtitle": title["subtitle"], "json": Markup(text)}  # noqa: S704


@functools.cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed in one script, out of the vl-convert wheel: no network."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _file(name: str) -> str:
    return (TEMPLATES / name).read_text("utf-8")
