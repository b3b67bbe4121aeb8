"""Pages of results as HTML: one look, one way to write a table; pictures lie beside them, or within."""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_STYLE = (
    "body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td,th{padding:.2em .8em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)

PAGE, REPORT = "biomass_jax", "biomass_jax report"  # what a page calls its maker: one page, one made of several
_PICTURE = re.compile(r"<img src='([^':/\\\\]+)'")
_BODY = re.compile(r".*?<h1>(.*?)</h1>\n(.*)</html>\s*", re.DOTALL)


def page(title: str, parts: Iterable[str], *, maker: str = PAGE) -> str:
    """A page.

    Args:
        title: as text.
        parts: its paragraphs, tables and pictures, as HTML.
        maker: `REPORT` for a page that is made of others.
    """
    name = html.escape(title)
    head = f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><meta name='generator' content='{maker}'>"
    head += f"<title>{name}</title>"
    return "\n".join([head, f"<style>{_STYLE}</style><h1>{name}</h1>", *parts]) + "</html>\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all cells are texts."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in columns) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def picture(png: bytes, text: str) -> str:
    """A picture within the page; `text` is what it shows, for readers who don't see it."""
    return f"<img src='data:image/png;base64,{base64.b64encode(png).decode()}' alt='{html.escape(text)}'>"


def read_page(path: Path) -> tuple[str, str] | None:
    """Title and body, as HTML, of a page that `page` has made, with its pictures within; None for any other file.

    Raises:
        OSError: it, or a picture of it, can't be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _BODY.fullmatch(text)
    if found is None or f"content='{PAGE}'>" not in text[:200]:
        return None

    def within(one: re.Match[str]) -> str:
        png = (path.parent / html.unescape(one[1])).read_bytes()
        return f"<img src='data:image/png;base64,{base64.b64encode(png).decode()}'"

    return found[1], _PICTURE.sub(within, found[2])
