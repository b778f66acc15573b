"""The report's figures: matplotlib in memory, colour-blind-safe colours, labels on the lines, an alt text for each."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import Curve
from .runs import Series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, without its yellow, which is too pale for a line on white."""
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
"""Line styles: the second round through the colours is dashed, the third dotted."""
BASE_COLOUR = "#555555"
BASE_LINES = {"greedy": (0, (1, 1.5)), "maj": (0, (4, 2.5))}
"""Horizontal lines of the untrained base that accuracy panels carry, by the start of their name."""
DPI = 160
PANEL = (4.1, 3.1)
"""Width and height of one panel, inches."""
HEADING = 0.3
"""Height of a figure's heading, inches."""
_WRAP = 23
_LABEL_SIZE = 8.5


@dataclass(frozen=True)
class Caption:
    """What is said of a figure besides drawing it. `alt` tells its lines in words."""

    name: str
    title: str
    text: str
    alt: str


@dataclass(frozen=True)
class Picture:
    """A finished figure. `name` is its file name without ending."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what it shows (`draw` returns the labels of its lines) and how it is headed."""

    title: str
    subtitle: str
    draw: Callable[[Axes], list[EndLabel]]
    share: bool = False
    """The values are shares: the axis goes from 0 to 1."""


@dataclass(frozen=True)
class EndLabel:
    """Text beside the end of a line, at height `y` in data units."""

    text: str
    y: float
    colour: str


class Styles:
    """Name, colour and line style of every series, the same in all figures of a report.

    In a study of several bases by several settings, a panel of one base names and colours its settings, alike in all
    of them, and a panel of one reward its bases (`by_base`).
    """

    def __init__(self, series: Sequence[Series], name: Callable[[Series], str] | None = None) -> None:
        self.grouped = any(item.within_base for item in series)
        self._series = series
        self.name = name or (lambda item: item.within_base or item.label)
        self._index = {name: index for index, name in enumerate(dict.fromkeys(map(self.name, series)))}

    @property
    def by_base(self) -> Styles:
        """For panels whose series differ in their base; the same styles where the study is not grouped."""
        return Styles(self._series, lambda item: item.base) if self.grouped else self

    def colour(self, series: Series) -> str:
        return COLOURS[self._index[self.name(series)] % len(COLOURS)]

    def line(self, series: Series) -> object:
        return LINES[self._index[self.name(series)] // len(COLOURS) % len(LINES)]


def accuracy_panels(series: Sequence[Series], eval_set: str, styles: Styles) -> list[Panel]:
    """One panel a base policy: the accuracy of the runs that start from it, with what the base itself scores."""
    panels = []
    for base in dict.fromkeys(item.base for item in series):
        members = [item for item in series if item.base == base and item.accuracy_metric(eval_set)]
        if not members:
            continue
        metric = str(members[0].accuracy_metric(eval_set)).rsplit("/", 1)[1]
        panels.append(
            Panel(
                title=f"Base: {base}",
                subtitle=f"{metric} on {eval_set}",
                draw=_accuracy_drawer(members, eval_set, styles),
                share=True,
            )
        )
    return panels


def _accuracy_drawer(members: Sequence[Series], eval_set: str, styles: Styles) -> Callable[[Axes], list[EndLabel]]:
    def draw(axes: Axes) -> list[EndLabel]:
        labels = []
        for name, value in base_scores(members, eval_set).items():
            kind = next((kind for kind in BASE_LINES if name.startswith(kind)), None)
            if kind is not None:
                axes.axhline(value, color=BASE_COLOUR, linestyle=BASE_LINES[kind], linewidth=1.2, zorder=1)
                labels.append(EndLabel(f"base {name} {_short(value)}", value, BASE_COLOUR))
        for item in members:
            metric = str(item.accuracy_metric(eval_set))
            labels += _draw_series(axes, item, metric, styles, band=metric + "_se")
        return labels

    return draw


def base_scores(members: Sequence[Series], eval_set: str) -> dict[str, float]:
    """What the untrained base of `members` scores on `eval_set`, by name, as the mean over their runs."""
    lines = [run.base_lines(eval_set) for item in members for run in item.runs]
    names = dict.fromkeys(name for found in lines for name in found)
    return {name: float(np.mean([found[name] for found in lines if name in found])) for name in names}


def proxy_panels(series: Sequence[Series], styles: Styles, *, unsupervised_only: bool = False) -> list[Panel]:
    """One panel a reward: rewards have different units, so only runs of one reward share an axis."""
    styles = styles.by_base
    shown = [item for item in series if item.curves("reward/proxy")]
    if unsupervised_only and any(not item.supervised for item in shown):
        shown = [item for item in shown if not item.supervised]
    panels = []
    for reward in dict.fromkeys(item.reward for item in shown):
        members = [item for item in shown if item.reward == reward]
        what = "Reward, from labels" if all(item.supervised for item in members) else "Proxy reward"
        panels.append(Panel(what, f"{reward}, batch mean", metric_drawer(members, "reward/proxy", styles)))
    return panels


def metric_drawer(members: Sequence[Series], metric: str, styles: Styles) -> Callable[[Axes], list[EndLabel]]:
    """Draws `metric` of every series that logged it."""

    def draw(axes: Axes) -> list[EndLabel]:
        return [label for item in members for label in _draw_series(axes, item, metric, styles)]

    return draw


def _draw_series(axes: Axes, item: Series, metric: str, styles: Styles, band: str | None = None) -> list[EndLabel]:
    """One series: its line with a band of one standard error, or the mean of its replicates over thin lines of each."""
    curves = item.curves(metric)
    if not curves:
        return []
    colour, line = styles.colour(item), styles.line(item)
    mean = item.mean(metric)
    if len(curves) > 1:
        for curve in curves:
            axes.plot(curve.steps, curve.values, color=colour, linewidth=0.7, alpha=0.45, zorder=2)
    elif band is not None:
        errors = item.mean(band)
        if np.array_equal(errors.steps, mean.steps):
            low, high = mean.values - errors.values, mean.values + errors.values
            axes.fill_between(mean.steps, low, high, color=colour, alpha=0.2, linewidth=0, zorder=2)
    if not len(mean):
        return []
    marker = "o" if len(mean) == 1 else None
    axes.plot(mean.steps, mean.values, color=colour, linestyle=line, linewidth=1.9, marker=marker, zorder=3)
    return [EndLabel(styles.name(item), float(mean.values[-1]), colour)]


def render(picture: Caption, panels: Sequence[Panel], *, columns: int = 3, heading: str = "") -> Picture | None:
    """Draw `panels` side by side, at most `columns` in a row, under a `heading`. None when there is nothing to draw."""
    if not panels:
        return None
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + (HEADING if heading else 0)), dpi=DPI)
    if heading:
        height = figure.get_size_inches()[1]
        figure.text(0.12 / (PANEL[0] * columns), 1 - 0.1 / height, heading, fontsize=12.5, fontweight="bold", va="top")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    drawn = [(axes, _draw_panel(axes, panel)) for axes, panel in zip(grid, panels, strict=False)]
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    margins = _margins([label for _, labels in drawn for label in labels], rows, columns, HEADING if heading else 0)
    figure.subplots_adjust(**margins)
    for axes, labels in drawn:
        _place_labels(axes, labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return Picture(picture.name, picture.title, picture.text, picture.alt, buffer.getvalue())


def _draw_panel(axes: Axes, panel: Panel) -> list[EndLabel]:
    labels = panel.draw(axes)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", pad=17)
    axes.text(0, 1.03, panel.subtitle, transform=axes.transAxes, fontsize=8.5, color="#444444")
    axes.set_xlabel("training step", fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8.5, color="#999999")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    return labels


def _margins(labels: Sequence[EndLabel], rows: int, columns: int, heading: float) -> dict[str, float]:
    """Margins that leave room for the longest label right of every panel, in `subplots_adjust`'s units."""
    longest = max((len(line) for label in labels for line in _wrap(label.text)), default=0)
    room = 0.2 + 0.066 * longest  # inches: the leader, and the mean width of a character at _LABEL_SIZE
    left, top, bottom = 0.5, 0.55, 0.5
    width, height = PANEL[0] * columns, PANEL[1] * rows + heading
    return {
        "left": left / width,
        "right": 1 - room / width,
        "top": 1 - (top + heading) / height,
        "bottom": bottom / height,
        "wspace": (left + room) / (PANEL[0] - left - room),
        "hspace": (top + bottom) / (PANEL[1] - top - bottom),
    }


def _place_labels(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Write each label right of the axes at its line's end, moved up or down just enough not to overlap."""
    if not labels:
        return
    to_points = 72 / DPI
    axes.get_ylim()  # brings the limits up to date, which transData does not do by itself
    box = axes.get_window_extent()
    heights = [len(_wrap(label.text)) * _LABEL_SIZE * 1.2 for label in labels]
    wanted = [float(axes.transData.transform((0, label.y))[1] - box.y0) * to_points for label in labels]
    placed = spread(wanted, heights, low=-4.0, high=box.height * to_points + 4.0)
    for label, at, y in zip(labels, wanted, placed, strict=True):
        axes.annotate(
            "\n".join(_wrap(label.text)),
            xy=(1.0, at / (box.height * to_points)),
            xycoords="axes fraction",
            xytext=(9, y - at),
            textcoords="offset points",
            color=label.colour,
            fontsize=_LABEL_SIZE,
            linespacing=1.05,
            va="center",
            annotation_clip=False,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "none", "edgecolor": "none"},
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def spread(wanted: Sequence[float], heights: Sequence[float], *, low: float, high: float) -> list[float]:
    """Centres of boxes of the given `heights` that lie near the `wanted` ones, in the same order, without overlap.

    Within [low, high] when they fit there. Boxes that would overlap form a block around their mean wish.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[tuple[list[int], float]] = []  # (boxes from below, lower edge)

    def lower_edge(boxes: list[int]) -> float:
        total = sum(heights[box] for box in boxes)
        below, edges = 0.0, []
        for box in boxes:
            edges.append(wanted[box] - below - heights[box] / 2)
            below += heights[box]
        return max(low, min(sum(edges) / len(edges), high - total))

    for index in order:
        boxes, edge = [index], lower_edge([index])
        while blocks and blocks[-1][1] + sum(heights[box] for box in blocks[-1][0]) > edge:
            boxes = blocks.pop()[0] + boxes
            edge = lower_edge(boxes)
        blocks.append((boxes, edge))
    placed = [0.0] * len(wanted)
    for boxes, edge in blocks:
        for box in boxes:
            placed[box] = edge + heights[box] / 2
            edge += heights[box]
    return placed


def describe_curves(series: Sequence[Series], metric_of: Callable[[Series], str | None]) -> str:
    """The lines of a figure in words, for people who cannot see it."""
    parts = []
    for item in series:
        metric = metric_of(item)
        if metric is None or not len(curve := item.mean(metric)):
            continue
        parts.append(f"{item.label}: {_describe(curve)}")
    return "; ".join(parts)


def _describe(curve: Curve) -> str:
    values, steps = curve.values, curve.steps
    text = f"{_short(values[0])} at step {steps[0]}"
    if len(curve) > 1:
        high, low = int(np.argmax(values)), int(np.argmin(values))
        text += (
            f", highest {_short(values[high])} at step {steps[high]}, lowest {_short(values[low])} at step {steps[low]}"
        )
        text += f", {_short(values[-1])} at step {steps[-1]}"
    return text


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, _WRAP) or [""]
