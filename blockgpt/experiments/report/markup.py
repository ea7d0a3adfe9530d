"""HTML of a report: escaping, tables, lists, data for its script. Texts of runs and plans pass `escape`."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def escape(value: object) -> str:
    """A value as text of an element or of an attribute in double quotes; what a file cannot hold becomes '?'."""
    return html.escape(str(value).encode(errors="replace").decode(), quote=True)


def breakable(name: str) -> str:
    """`escape` of a variant's name, which may be long: a line may end after each of its options."""
    return re.sub(r"\+(?=\w*[a-z])", "+<wbr>", escape(name))


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[str] = (), caption: str = "",
          marked: Iterable[tuple[int, int]] = ()) -> str:
    """A table in a box that scrolls by itself, its first column fixed.

    Args:
        left: headers of the columns that are aligned to the left; the first always is.
        marked: (row, column) of cells that are marked.
    """
    left_columns = {0, *(i for i, name in enumerate(header) if name in set(left))}
    cells, marked = set(marked), set(marked)

    def cell(tag: str, row: int, column: int, text: str) -> str:
        names = ["left"] * (column in left_columns) + ["marked"] * ((row, column) in cells)
        scope = {-1: ' scope="col"'}.get(row, ' scope="row"' if tag == "th" else "")
        return f"<{tag}{scope}{_classes(names)}>{breakable(text)}</{tag}>"

    head = "".join(cell("th", -1, i, name) for i, name in enumerate(header))
    body = "".join("<tr>" + "".join(cell("td" if j else "th", i, j, text) for j, text in enumerate(row)) + "</tr>\n"
                   for i, row in enumerate(rows))
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (f'<div class="scroll" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
            "</table></div>\n")


def _classes(names: Sequence[str]) -> str:
    return f' class="{" ".join(names)}"' if names else ""


def bullets(texts: Iterable[str], name: str = "") -> str:
    """A list of texts; nothing without one."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul{_classes([name] if name else [])}>{items}</ul>\n" if items else ""


def details(summary: str, content: str, is_open: bool = False) -> str:
    """Content that can be unfolded. Printing unfolds it."""
    return f"<details{' open' * is_open}><summary>{escape(summary)}</summary>\n{content}</details>\n"


def code_block(lines: Iterable[str]) -> str:
    """Commands to copy."""
    return f'<pre tabindex="0"><code>{escape(chr(10).join(lines))}</code></pre>\n'


def section(title: str, content: str, name: str) -> str:
    """A section of the page with an anchor; nothing without content."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{content}</section>\n' if content else ""


def script_data(value: Any) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
