"""The page of ``inspect``: one HTML file with pictures and plots in it, no scripts, nothing to fetch."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from lightning_robot.commands.inspect import array_row, overview, statistics_name
from lightning_robot.data.inspection import Inspection

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.35em; overflow-wrap: anywhere } h2 { font-size: 1.1em; margin: 2em 0 .4em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em }
td, th { text-align: left; padding: .18em .9em .18em 0; border-bottom: 1px solid #e6e8ee; vertical-align: top }
td.number, th.number { text-align: right }
.strip { display: flex; gap: 4px; margin: 4px 0; overflow-x: auto; align-items: center }
.strip img { height: 96px; image-rendering: pixelated; border-radius: 3px }
.strip span { min-width: 6.5em; color: #667; font-size: .85em }
.defect td:first-child { color: #a3341c; font-weight: 600 }
svg { display: block; margin: .3em 0 } .legend { font-size: .82em; color: #556 } .fine { color: #2d7a46 }
"""
_COLORS = ("#3366cc", "#d4682a", "#2e9a62", "#9a4fb5", "#b8860b", "#c2334d", "#1c8ea6", "#6b6f7b")


def write_page(inspection: Inspection, path: str | Path) -> Path:
    """Writes the page aside and renames it.

    Args:
        inspection: what is shown.
        path: of the file.

    Returns:
        Its absolute path.
    """
    path = Path(path).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(page(inspection), encoding="utf-8")
    os.replace(aside, path)
    return path


def page(inspection: Inspection) -> str:
    """The page's text."""
    name = inspection.path.name
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{escape(str(inspection.path))}</h1>",
        _table((), overview(inspection)),
        "<h2>Defects</h2>",
    ]
    if inspection.defects:
        rows = [(defect.what, defect.where, defect.text) for defect in inspection.defects]
        parts.append(_table(("looks wrong", "where", "what was seen"), rows, kind="defect"))
    else:
        parts.append('<p class="fine">Nothing looks wrong.</p>')
    parts.append(f"<p>{escape(inspection.checked)}</p>")
    if inspection.strips:
        parts.append("<h2>Cameras</h2>")
    for key, rows_of_pictures in inspection.strips.items():
        parts.append(f"<h3>{escape(key)}</h3>")
        for episode, pictures in rows_of_pictures:
            images = "".join(f'<img alt="" src="{_picture(pixels)}">' for pixels in pictures)
            parts.append(f'<div class="strip"><span>episode {episode}</span>{images}</div>')
    if inspection.tasks:
        parts += ["<h2>Tasks</h2>", _table(("episodes or segments", "task"), [(str(n), text) for text, n in inspection.tasks])]
    parts += ["<h2>Lengths of episodes</h2>", _histogram(inspection.lengths)]
    parts.append(f"<h2>Episode {inspection.curve_episode}</h2>")
    for key, values in inspection.curves.items():
        names = next((tuple(element.name for element in entry.elements) for entry in inspection.keys if entry.name == key), ())
        parts += [f"<h3>{escape(key)}</h3>", _curves(values, names)]
    parts += ["<h2>Arrays</h2>", _table(("key", "shape", "dtype", "unit", "decoded"), map(array_row, inspection.keys))]
    statistics = [
        (
            statistics_name(key),
            element.name,
            *(f"{value:.4g}" for value in (element.min, element.max, element.mean, element.std)),
        )
        for key in inspection.keys
        for element in key.elements
    ]
    parts += ["<h2>Statistics</h2>", _table(("key", "element", "min", "max", "mean", "std"), statistics, numbers=4)]
    return "\n".join([*parts, "</body></html>\n"])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", numbers: int = 0) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        first = len(cells) - numbers
        mark = [' class="number"' if numbers and place >= first else "" for place in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{escape(cell)}</{tag}>" for m, cell in zip(mark, cells)) + "</tr>"

    head = line(heads, "th") if heads else ""
    return f'<table class="{kind}">{head}{"".join(line(row, "td") for row in rows)}</table>'


def _picture(pixels: np.ndarray) -> str:
    """(height, width, 3) uint8 -> a data address of a JPEG of at most 192 rows."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    if image.height > 192:
        image = image.resize((max(1, round(192 * image.width / image.height)), 192))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _histogram(lengths: np.ndarray) -> str:
    width, height = 620, 90
    counts, edges = np.histogram(lengths, bins=min(40, max(1, len(np.unique(lengths)))))
    bar = width / len(counts)
    bars = "".join(
        f'<rect x="{place * bar:.1f}" y="{height * (1 - count / counts.max()):.1f}" width="{max(1.0, bar - 1):.1f}" '
        f'height="{height * count / counts.max():.1f}" fill="{_COLORS[0]}"><title>{edges[place]:.0f} to {edges[place + 1]:.0f} '
        f"frames: {count}</title></rect>"
        for place, count in enumerate(counts.tolist())
    )
    svg = f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{bars}</svg>'
    return f'{svg}<p class="legend">{int(lengths.min())} to {int(lengths.max())} frames</p>'


def _curves(values: np.ndarray, names: tuple[str, ...]) -> str:
    """Every element over time, each scaled to its own range; at most eight."""
    width, height = 620, 110
    lines, legend = [], []
    for element in range(min(values.shape[1], len(_COLORS))):
        column = values[:, element].astype(np.float64)
        finite = column[np.isfinite(column)]
        if not len(finite):
            continue
        low, span = finite.min(), max(float(np.ptp(finite)), 1e-12)
        steps = width / max(1, len(column) - 1)
        points = " ".join(
            f"{place * steps:.1f},{height - 4 - (height - 8) * (value - low) / span:.1f}"
            for place, value in enumerate(column.tolist())
            if np.isfinite(value)
        )
        color = _COLORS[element]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.4"/>')
        name = names[element] if len(names) == values.shape[1] else str(element)
        legend.append(f'<span style="color:{color}">{escape(name)}</span> {finite.min():.3g} … {finite.max():.3g}')
    if values.shape[1] > len(_COLORS):
        legend.append(f"… {values.shape[1] - len(_COLORS)} more")
    svg = f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(lines)}</svg>'
    return f'{svg}<p class="legend">{" &nbsp; ".join(legend)}</p>'
