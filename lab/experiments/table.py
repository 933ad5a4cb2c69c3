"""The raw table of an experiment: one JSON line per measured point, written as it is measured."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Table:
    """Rows in a file. A point that is there is not measured again, so a run can be resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> list[Row]:
        """The rows that have all these values."""
        return [row for row in self.rows if key.items() <= row.items()]

    def pairs(self, *keys: Row) -> tuple[list[int], list[str]]:
        """Subjects of which each of the keys has a row, and the seeds complete in all of them."""
        found = [{(row["seed"], row["subject"]) for row in self.find(**key)} for key in keys]
        common = set.intersection(*found)
        subjects = sorted({subject for _, subject in common})
        seeds = sorted({seed for seed, _ in common})
        return [s for s in seeds if all((s, each) in common for each in subjects)], subjects

    def __contains__(self, key: Row) -> bool:
        return bool(self.find(**key))

    def add(self, row: Row) -> None:
        """Appends a row; numbers are kept to four digits, so that the file stays small."""
        row = {name: _short(value) for name, value in row.items()}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
