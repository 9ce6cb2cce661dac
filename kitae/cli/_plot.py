"""Curves in the terminal (braille dots) and as a PNG (matplotlib, the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kitae.errors import MissingExtraError

# Bit of each dot in a braille cell, by (column, row from the top); Unicode 2800.
_DOTS = {(0, 0): 1, (0, 1): 2, (0, 2): 4, (1, 0): 8, (1, 1): 16, (1, 2): 32, (0, 3): 64, (1, 3): 128}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A named series of (step, value) points."""

    title: str
    points: Sequence[tuple[float, float]]


def draw_text(curve: Curve, *, width: int = 28, height: int = 7) -> list[str]:
    """The curve as `height + 2` lines of text: title, dots with the value axis, step axis."""
    points = sorted(curve.points)
    if not points:
        return [curve.title, "(no points yet)"]
    low, high = min(v for _, v in points), max(v for _, v in points)
    first, last = points[0][0], points[-1][0]
    columns, rows = width * 2, height * 4
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for column in range(columns):
        value = _value_at(points, first + (last - first) * column / max(columns - 1, 1))
        row = rows - 1 - round((value - low) / ((high - low) or 1.0) * (rows - 1))
        for y in _between(before, row):
            cells[y // 4][column // 2] |= _DOTS[column % 2, y % 4]
        before = row
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [f"{curve.title:^{width + margin + 1}}".rstrip()]
    for label, line in zip(labels, cells, strict=True):
        lines.append(f"{label:>{margin}}|" + "".join(chr(0x2800 + bits) for bits in line))
    return [*lines, f"{'':>{margin}} {first:<{width // 2}g}{last:>{width - width // 2}g}"]


def _between(before: int | None, row: int) -> range:
    """Dots of one column that join it to the column before: a line, not a cloud."""
    if before is None or before == row:
        return range(row, row + 1)
    return range(before + 1, row + 1) if row > before else range(row, before)


def _value_at(points: Sequence[tuple[float, float]], x: float) -> float:
    """Linear interpolation between neighbouring points."""
    before = max((p for p in points if p[0] <= x), default=points[0])
    after = min((p for p in points if p[0] >= x), default=points[-1])
    if after[0] == before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (x - before[0]) / (after[0] - before[0])


def side_by_side(left: list[str], right: list[str], *, gap: int = 3) -> str:
    """Two blocks of lines beside each other."""
    width = max(map(len, left))
    height = max(len(left), len(right))
    left, right = ([*block, *[""] * (height - len(block))] for block in (left, right))
    return "\n".join(f"{a:<{width}}{' ' * gap}{b}".rstrip() for a, b in zip(left, right, strict=True))


def draw_png(curves: Sequence[Curve], path: Path, *, x_label: str) -> None:
    """The curves beside each other as one picture."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingExtraError("drawing a PNG needs matplotlib: pip install 'kitae[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.2), squeeze=False)
    for axis, curve in zip(axes[0], curves, strict=True):
        axis.plot(*zip(*sorted(curve.points), strict=True), color="#c2410c", linewidth=1.8)
        axis.set_title(curve.title)
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.25)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
