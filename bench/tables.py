"""Markdown tables, and the pages that have them between two markers.

What a command writes lies between `<!-- table: COMMAND -->` and `<!-- end of table -->`; the rest of a page is
written by hand, and the command leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

END = "<!-- end of table -->"


def begin(command: str) -> str:
    """The marker in front of what `command` writes."""
    return f"<!-- table: {command} -->"


def row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(titles: Sequence[str], words: int = 1) -> list[str]:
    """The two lines above the rows; columns after the first `words` have numbers, which are aligned to the right."""
    return [row(titles), row(["---"] * words + ["--:"] * (len(titles) - words))]


def table(titles: Sequence[str], rows: Iterable[Iterable[object]], words: int = 1) -> str:
    return "\n".join([*head(titles, words), *map(row, rows)])


def replaced(text: str, command: str, new: str) -> str:
    """`text` with `new` between the markers of `command`; ValueError unless they are there, once and in order."""
    before, found, rest = text.partition(begin(command))
    if not found or begin(command) in rest or END not in rest:
        raise ValueError(f"expected {begin(command)} once, and {END} after it")
    _, _, after = rest.partition(END)
    return f"{before}{found}\n{new.strip()}\n{END}{after}"


def write(page: Path, command: str, new: str) -> None:
    """Put `new` into `page`. Raises ValueError, OSError."""
    text = page.read_text(encoding="utf-8")
    try:
        page.write_text(replaced(text, command, new), encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None
