"""Charts as SVG text. Colours are CSS classes of the page, so one chart serves light, dark and paper.

A view box is narrow (440 units), so that its 13-unit text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lorasmith.schemas.evaluation import Interval

WIDTH = 440
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 44  # margins of charts with two axes
HEIGHT = 250


def page_style() -> str:
    """The style sheet of pages with charts, for their own `<style>`: a page is one file."""
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one line; `style` is the CSS class of its colour."""

    name: str
    style: str
    points: list[tuple[float, float]]


def svg(height: float, title: str, description: str, body: Sequence[str]) -> str:
    """A chart with what a screen reader says about it."""
    label = escape(f"{title}. {description}", quote=True)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(body)}</svg>"
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", style: str = "label") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def share_bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, str, Interval]]]]) -> str:
    """Horizontal bars from 0 to 100 %: per group (a metric) one bar (name, style, interval) for each condition."""
    bar, gap, heading = 17, 5, 26
    plot_right = WIDTH - 66  # room for the value behind a full bar
    bottom = sum(heading + len(bars) * (bar + gap) + 8 for _, bars in groups)
    body = []
    for percent in (0, 25, 50, 75, 100):
        x = plot_right * percent / 100 + 1
        body += [
            line(x, 4, x, bottom, "grid"),
            text(x, bottom + 16, f"{percent} %", anchor="start" if percent == 0 else "middle"),
        ]
    y = 0.0
    spoken = []
    for group, bars in groups:
        body.append(text(1, y + heading - 8, group, style="label strong"))
        y += heading
        for name, style, interval in bars:
            low, mean, high = (
                plot_right * min(max(value, 0.0), 1.0) for value in (interval.low, interval.mean, interval.high)
            )
            middle = y + bar / 2
            body.append(
                f'<rect x="1" y="{y:.1f}" width="{max(mean, 1):.1f}" height="{bar}" rx="2" class="fill-{style}"/>'
            )
            if high > low:
                for stroke in ("halo", "error"):  # the halo sets the whisker off from its own bar
                    body.append(line(1 + low, middle, 1 + high, middle, stroke))
                    body += [line(1 + end, middle - 4, 1 + end, middle + 4, stroke) for end in (low, high)]
            shown = f"{100 * interval.mean:.1f} %"
            body.append(text(max(mean, high) + 7, middle + 4.5, shown, style="label value"))
            spoken.append(f"{group}, {name}: {shown}")
            y += bar + gap
        y += 8
    return svg(bottom + 22, title, "; ".join(spoken), body)


def line_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Lines over a common x; the y axis starts where the data does, because a loss has no natural top."""
    points = [point for one in series for point in one.points]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points))
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]),
        )

    body = axes([(place(x, 0)[0], f"{x:g}") for x in x_ticks], [(place(0, y)[1], y) for y in y_ticks], x_label, y_label)
    spoken = []
    for one in series:
        placed = [place(x, y) for x, y in one.points]
        body.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}" class="line-{one.style}"/>')
        if len(placed) <= 40:
            body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="fill-{one.style}"/>' for x, y in placed]
        spoken.append(f"{one.name} goes from {one.points[0][1]:.3f} to {one.points[-1][1]:.3f}")
    return svg(HEIGHT, title, "; ".join(spoken), body)


def histogram(title: str, values: Sequence[float], *, style: str, x_label: str) -> str:
    """How many of the values fall into each of about 16 bins of equal, round width; values are whole and not negative."""
    width = max(1, math.ceil(nice_step((max(values) - min(values)) / 16)))
    first = int(min(values) // width)
    counts = [0] * (int(max(values) // width) - first + 1)
    for value in values:
        counts[int(value // width) - first] += 1
    middle = sorted(values)[len(values) // 2]
    description = f"{len(values)} examples, from {min(values):g} to {max(values):g}, median {middle:g}"
    return columns(title, first * width, width, counts, style=style, x_label=x_label, description=description)


def columns(
    title: str,
    start: int,
    width: int,
    counts: Sequence[int],
    *,
    above: int = 0,
    limit: int | None = None,
    style: str,
    x_label: str,
    description: str,
) -> str:
    """One column for each bin of `width` from `start` on, and behind a gap one for all that is `above` the last.

    `limit` is a line across, where it is among them.
    """
    y_ticks = ticks(0, max(*counts, above, 1))
    plot_height, base = HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM
    places = [*range(len(counts)), *([len(counts) + 1] if above else [])]  # in columns; a gap sets the last one off
    column = (WIDTH - LEFT - RIGHT) / (places[-1] + 1)
    every = math.ceil(len(counts) / 6)
    x_marks = [(LEFT + column * i, f"{start + i * width:,}") for i in range(0, len(counts) + 1, every)]
    if above:
        x_marks = [mark for mark in x_marks if mark[0] < LEFT + column * (len(counts) - 1.5)]
        x_marks.append((LEFT + column * (len(counts) + 1), f"{start + len(counts) * width:,}+"))
    body = axes(x_marks, [(base - plot_height * y / y_ticks[-1], y) for y in y_ticks], x_label, "examples")
    for place, count in zip(places, [*counts, *([above] if above else [])], strict=True):
        height = plot_height * count / y_ticks[-1]
        x = LEFT + place * column
        body.append(
            f'<rect x="{x + 0.5:.1f}" y="{base - height:.1f}" width="{max(column - 1, 0.5):.1f}" height="{height:.1f}" '
            f'class="fill-{style}"/>'
        )
    if limit is not None and start <= limit <= start + width * len(counts):
        x = LEFT + column * (limit - start) / width
        body += [line(x, TOP, x, base, "error"), text(x + 5, TOP + 11, f"limit {limit:,}", style="label value")]
    return svg(HEIGHT, title, description, body)


def axes(x_marks: list[tuple[float, str]], y_marks: list[tuple[float, float]], x_label: str, y_label: str) -> list[str]:
    """Grid lines and tick labels at (place, words) and (place, value)."""
    body = []
    for y, value in y_marks:
        body += [line(LEFT, y, WIDTH - RIGHT, y, "grid"), text(LEFT - 6, y + 4.5, short(value), anchor="end")]
    for x, words in x_marks:
        body.append(text(x, HEIGHT - BOTTOM + 17, words, anchor="middle"))
    body.append(text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 7, x_label, anchor="middle"))
    body.append(
        f'<text transform="translate(12 {(HEIGHT - BOTTOM + TOP) / 2:g}) rotate(-90)" text-anchor="middle" class="label">'
        f"{escape(y_label)}</text>"
    )
    return body


def short(value: float) -> str:
    """1500 → `1.5k`: four digits run into the label beside them."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def nice_step(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten that is not below `rough`."""
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that enclose both ends."""
    if high <= low:
        high = low + 1
    step = nice_step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
