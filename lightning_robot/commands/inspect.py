"""``inspect``: a dataset at a glance, in the terminal and as one HTML file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_robot.data.inspection import Inspection, Key


def parser() -> argparse.ArgumentParser:
    """The command's own parser."""
    result = argparse.ArgumentParser(
        "python -m lightning_robot inspect",
        description="Shows what a dataset holds: episodes, rates, ranges, statistics, pictures, tasks, and what looks wrong.",
        allow_abbrev=False,
    )
    result.add_argument("path", metavar="PATH", help="an episode store (Zarr), or a LeRobot folder")
    result.add_argument("--html", metavar="FILE", help="write a page too, one file with everything in it")
    result.add_argument("--thorough", action="store_true", help="look at the pictures of all episodes, not of twelve")
    result.add_argument(
        "--jump", type=float, default=8.0, help="times the usual step from which a change is a jump (default %(default)s)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: arguments after ``inspect``; those of the process when None.

    Returns:
        0, also where something looks wrong; 1 after an error, which is printed; 130 after an interruption from the keyboard.
    """
    arguments = parser().parse_args(argv)
    from lightning_robot.console import say
    from lightning_robot.data.inspection import inspect_dataset

    try:
        inspection = inspect_dataset(arguments.path, thorough=arguments.thorough, jump=arguments.jump)
        show(inspection)
        if arguments.html:
            from lightning_robot.commands.inspect_page import write_page

            say(f"Page: {write_page(inspection, arguments.html)}")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("inspect: interrupted.", file=sys.stderr)
        return 130
    return 0


def show(inspection: Inspection) -> None:
    """Prints tables, wide enough where the output is no terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(f"[bold]{escape(str(inspection.path))}[/bold]", soft_wrap=True)
    for name, value in overview(inspection):
        console.print(f"  {name}: {escape(value)}", soft_wrap=True)
    arrays = Table("key", "shape", "dtype", "unit", "decoded", title="Arrays", title_justify="left")
    for key in inspection.keys:
        arrays.add_row(*array_row(key))
    console.print(arrays)
    statistics = Table("key", "element", "min", "max", "mean", "std", title="Statistics", title_justify="left")
    for key in inspection.keys:
        for number, element in enumerate(key.elements[:32]):
            values = (f"{value:.4g}" for value in (element.min, element.max, element.mean, element.std))
            statistics.add_row(statistics_name(key) if number == 0 else "", escape(element.name), *values)
        if len(key.elements) > 32:
            statistics.add_row("", f"… {len(key.elements) - 32} more", "", "", "", "")
    console.print(statistics)
    if inspection.tasks:
        tasks = Table("episodes or segments", "task", title="Tasks", title_justify="left")
        for text, count in inspection.tasks[:20]:
            tasks.add_row(str(count), escape(text))
        if len(inspection.tasks) > 20:
            tasks.add_row("", f"… {len(inspection.tasks) - 20} more")
        console.print(tasks)
    if inspection.defects:
        defects = Table("looks wrong", "where", "what was seen", title="Defects", title_justify="left")
        for defect in inspection.defects[:40]:
            defects.add_row(defect.what, escape(defect.where), escape(defect.text))
        if len(inspection.defects) > 40:
            defects.add_row("", "", f"… {len(inspection.defects) - 40} more")
        console.print(defects)
    else:
        console.print("Nothing looks wrong.")
    console.print(inspection.checked, soft_wrap=True)


def overview(inspection: Inspection) -> list[tuple[str, str]]:
    """Headings and values: format, size, episodes, lengths, rate, provenance."""
    import numpy as np

    from lightning_robot.console import counted, disk_size, duration

    lengths = inspection.lengths
    frames = int(lengths.sum())
    time = f", {duration(frames / inspection.rate)}" if inspection.rate else ""
    rows = [
        ("format", f"{inspection.format}, {disk_size(inspection.bytes)} on disk"),
        ("episodes", f"{counted(len(lengths), 'episode')}, {counted(frames, 'frame')}{time}"),
        ("lengths", f"{lengths.min()} to {lengths.max()} frames, median {np.median(lengths):g}"),
        ("rate", f"{inspection.rate:g} Hz" if inspection.rate else "not stated"),
    ]
    return rows + inspection.notes


def array_row(key: Key) -> tuple[str, str, str, str, str]:
    """What the table of arrays tells of one."""
    from lightning_robot.console import disk_size

    return key.name, " x ".join(map(str, key.shape)) or "1", key.dtype, key.unit, disk_size(key.size)


def statistics_name(key: Key) -> str:
    """Name in the table of statistics."""
    return f"{key.name} (sampled)" if key.sampled else key.name
