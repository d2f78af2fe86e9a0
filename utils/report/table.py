"""A table as a value, and as CSV and LaTeX (booktabs). A cell is a word or a Number, which knows where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from utils.report.numbers import NO_INTERVAL, Number
from utils.run.artifacts import published, write_json

Cell = str | Number | None
FORMULA = ("=", "+", "-", "@")


@dataclass(frozen=True)
class Table:
    """`rows` share their columns; the first of these names the row."""

    name: str
    title: str
    note: str
    rows: list[dict[str, Cell]]

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

    def cells(self) -> Iterator[tuple[str, Number]]:
        """(table/row/column, number) of every number."""
        for row in self.rows:
            words = ".".join(cell for cell in row.values() if isinstance(cell, str))
            yield from ((f"{self.name}/{words}/{column}", cell) for column, cell in row.items() if isinstance(cell, Number))

    def frame(self) -> pd.DataFrame:
        """Full precision; a number has three columns: value, <name>_low, <name>_high. A p-value or a count has one. A word that a
        spreadsheet would take for a formula gets an apostrophe."""
        plain = {column for row in self.rows for column, cell in row.items() if isinstance(cell, Number) and cell.unit in NO_INTERVAL}
        return pd.DataFrame([dict(_flat(row, plain)) for row in self.rows])

    def latex(self) -> str:
        """A booktabs tabular with rounded numbers and their intervals."""
        shown = pd.DataFrame([{column: shown_cell(cell) for column, cell in row.items()} for row in self.rows], columns=self.columns)
        named = shown.rename(columns=lambda column: column.replace("_", " "))
        return str(named.to_latex(index=False, escape=True, column_format="l" + "r" * (len(self.columns) - 1)))


def _flat(row: dict[str, Cell], plain: set[str]) -> Iterator[tuple[str, Any]]:
    numeric = (Number, type(None))
    for column, cell in row.items():
        word = f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell
        yield column, cell.value if isinstance(cell, Number) else word
        if isinstance(cell, numeric) and column not in plain:
            yield from ((f"{column}_{bound}", getattr(cell, bound, None)) for bound in ("low", "high"))


def shown_cell(cell: Cell) -> str:
    """As printed: a number with its interval where it has one, a dash where there is nothing."""
    if cell is None:
        return "--"
    return cell if isinstance(cell, str) else cell.text(bare=cell.low is None)


def write_tables(made: list[Table], folder: Path) -> None:
    """Write every table as <name>.csv (numbers at full precision) and <name>.tex (rounded)."""
    with published(folder) as aside:
        aside.mkdir()
        for table in made:
            table.frame().to_csv(aside / f"{table.name}.csv", index=False)
            (aside / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")


def write_numbers(made: list[Table], files: Mapping[str, list[str]], path: Path) -> None:
    """{table/row/column: value, interval, unit, how, sources} of every number in a table; `files` of each artefact."""
    write_json(path, {name: number.traced(files) for table in made for name, number in table.cells()})
