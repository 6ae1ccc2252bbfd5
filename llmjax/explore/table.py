"""Tables that print as text and show as HTML in a notebook."""

from dataclasses import dataclass
from html import escape

SHADES = ("#cfe8fc", "#fde2c8", "#d3f2d6", "#f9d5e2", "#e3dafb", "#fbf3c2", "#cdeeed", "#e6e2dc")
"""Backgrounds of shaded cells, light enough for black text."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under column names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shades: tuple[tuple[int | None, ...], ...] = ()
    """Background of each cell in HTML, as a number; empty: none."""

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join(
            [self.title, text[0], "  ".join("-" * width for width in widths), *text[1:]]
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>"
            + "".join(self._cell(index, place, text) for place, text in enumerate(row))
            + "</tr>"
            for index, row in enumerate(self.rows)
        )
        caption = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _cell(self, row: int, column: int, text: str) -> str:
        shade = self.shades[row][column] if self.shades else None
        style = "text-align: left"
        if shade is not None:
            style += f"; color: #000; background: {SHADES[shade % len(SHADES)]}"
        return f'<td style="{style}">{escape(text)}</td>'


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tables under a title."""

    title: str
    tables: tuple[Table, ...]

    def __str__(self) -> str:
        return "\n\n".join([self.title, *map(str, self.tables)])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        tables = "".join(table._repr_html_() for table in self.tables)
        return f"<p>{escape(self.title)}</p>{tables}"
