"""Metrics in one CSV file, continued when a run is taken up again."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsFile(Logger):
    """Writes ``metrics.csv``, a row per logged step, each row at once (a killed run loses none).

    Lightning's own CSV logger deletes the file of the run that is taken up again.

    Args:
        directory: the run directory.
        first_step: steps from here on will be logged again (the run resumes there): their rows are dropped.
        unlogged: the row, with its ``step``, that was to be written just after the checkpoint that the run resumes from.
    """

    def __init__(self, directory: str | Path, first_step: int | None = None, unlogged: dict[str, float] | None = None) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self._columns: list[str] = []
        self._first_step, self._unlogged = first_step, unlogged
        self._opened = False

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run directory's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step if step is not None else 0} | {key: float(value) for key, value in metrics.items()}
        try:
            self._write(row)
        except OSError as error:  # a full disk's error names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _write(self, row: dict[str, float]) -> None:
        if not self._opened:
            self._open()
        new = [key for key in row if key not in self._columns]
        if new:
            rows = self._read() if self.path.exists() else []
            self._columns += sorted(new, key=lambda key: (key != "step", key != "epoch", key))
            self._rewrite([*rows, row])
            return
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _open(self) -> None:
        self._opened = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        if self.path.exists():
            rows = self._read()
            if self._first_step is not None:
                rows = [row for row in rows if row["step"].isdigit() and int(row["step"]) < self._first_step]
                self._rewrite(rows)
        if self._unlogged is not None:
            self._add_unlogged(rows)

    def _add_unlogged(self, rows: list[dict[str, str]]) -> None:
        """Writes the row that a kill may have prevented, unless it is there."""
        assert self._unlogged is not None
        values = {key: value for key, value in self._unlogged.items() if key not in ("step", "epoch")}
        step = str(self._unlogged["step"])
        if not any(row["step"] == step and all(row.get(key) for key in values) for row in rows):
            self.log_metrics({key: self._unlogged[key] for key in ("epoch", *values)}, int(step))

    def _read(self) -> list[dict[str, str]]:
        with self.path.open(newline="") as file:
            # What a full disk cut off has no end of line.
            reader = csv.DictReader((line for line in file if line.endswith("\n")), restval="")
            rows = [row for row in reader if None not in row and any(value for key, value in row.items() if key != "step")]
            self._columns = list(reader.fieldnames or [])
        return rows

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        aside = self.path.with_name(".metrics.csv.partial")
        try:
            with aside.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns, restval="")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(aside, self.path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise


def read_metrics(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Reads a metrics file: for each metric its (step, value) pairs in order."""
    series: dict[str, list[tuple[int, float]]] = {}
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key != "step" and value not in ("", None):
                    series.setdefault(key, []).append((int(row["step"]), float(value)))
    return series
