"""Pages of results as HTML: one look, one way to write a table; pictures lie beside them."""

import html
from collections.abc import Iterable, Sequence

_STYLE = (
    "body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td,th{padding:.2em .8em;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def page(title: str, parts: Iterable[str]) -> str:
    """A page.

    Args:
        title: as text.
        parts: its paragraphs, tables and pictures, as HTML.
    """
    name = html.escape(title)
    head = f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{name}</title>"
    return "\n".join([head, f"<style>{_STYLE}</style><h1>{name}</h1>", *parts]) + "</html>\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all cells are texts."""
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in columns) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])
