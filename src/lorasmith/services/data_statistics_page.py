"""The page of `data stats`: one HTML file that needs no network and reads on a screen, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from lorasmith.errors import Conflict, InvalidSpec
from lorasmith.files import write_text
from lorasmith.plots import columns, page_style
from lorasmith.schemas.statistics import DatasetStatistics, Distribution, PartContent, TokenStatistics

SHOWN_LABELS, SHOWN_LANGUAGES = 20, 8
HEADINGS = ("", "mean", "p50", "p90", "p95", "p99", "max", "total")


def write_page(found: DatasetStatistics, path: Path, *, force: bool = False) -> None:
    """Write the page. Raises `Conflict` when the file is there, unless `force`."""
    if path.suffix not in (".html", ".htm"):
        raise InvalidSpec(f"the page is HTML, and {path} has another ending", hint=f"--output {path.stem}.html")
    if path.exists() and not force:
        raise Conflict(f"{path} exists already", hint="choose another --output, or replace it with --force")
    write_text(path, page(found))


def page(found: DatasetStatistics) -> str:
    """As text. Everything that comes from the data is escaped."""
    title = f"{found.dataset} · lorasmith statistics"
    model = f" · tokens of <b>{escape(found.tokens.model)}</b>" if found.tokens else ""
    fates = ", ".join(f"{fate} {count:,}" for fate, count in found.fates.items())
    sections = [
        f"<header><h1>{escape(found.dataset)}</h1>",
        f'<p class="soft">{escape(found.format)} · {escape(fates)}{model}</p></header>',
        *([tokens_section(found.tokens)] if found.tokens else []),
        *([time_section(found)] if found.estimate else []),
        *(part_section(part, content) for part, content in found.parts.items()),
        f'<p class="soft">sha256 {found.sha256}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{page_style()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def tokens_section(found: TokenStatistics) -> str:
    rows = []
    charts = []
    notes = []
    for part, tokens in found.parts.items():
        rows += [(part, tokens.tokens), (f"{part}, trained", tokens.trained)]
        charts.append(chart(f"Tokens of an example, {part}", tokens.tokens, "base", "tokens", found.max_tokens))
        charts.append(chart(f"Trained tokens of an example, {part}", tokens.trained, "adapter", "trained tokens"))
        over = f"{tokens.over:,} of {tokens.tokens.count:,} ({tokens.over / tokens.tokens.count:.1%})"
        note = f"{part}: {tokens.trained_share:.1%} of the tokens are trained; {over} examples are over the limit"
        note += f", by {tokens.over_tokens:,} tokens in all" if tokens.over else ""
        notes.append(note)
        notes += [f"{part}: {count:,} examples fail the check {name}" for name, count in tokens.failed_checks.items()]
    context = f", the model's context is {found.context:,}" if found.context else ""
    return section(
        "Tokens",
        f"<p>As {escape(found.model)} is trained on them, before anything is cut. "
        f"The limit is {found.max_tokens:,} tokens{context}.</p>",
        items(notes),
        table(rows),
        f'<div class="charts wide">{"".join(charts)}</div>',
    )


def time_section(found: DatasetStatistics) -> str:
    assert found.estimate is not None
    clock = found.estimate.time
    if clock is None:
        return section("Training", f"<p>No time was measured: {escape(found.estimate.why_no_time or '')}.</p>")
    return section(
        "Training",
        f"<p>{found.estimate.steps:,} steps take about {minutes(clock.total_s)} on this machine "
        f"({minutes(clock.low_s)} to {minutes(clock.high_s)}, {clock.tokens_per_s:,.0f} tokens/s), "
        f"and {found.estimate.memory.peak_bytes / 1e9:.1f} GB of memory.</p>",
    )


def part_section(part: str, content: PartContent) -> str:
    rows = [
        ("turns", content.turns),
        ("prompt characters", content.prompt_characters),
        ("answer characters", content.answer_characters),
    ]
    facts: list[tuple[str, str]] = []
    if content.roles:
        facts.append(("messages by role", counted(content.roles)))
    if content.languages is not None:
        name = "languages of the answers"
        if content.languages_of < content.examples:
            name += f" ({content.languages_of:,} looked at)"
        facts.append((name, most_frequent(content.languages)))
    return section(
        f"{part}: {content.examples:,} examples",
        table(rows),
        '<dl class="wide">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(words)}</dd></div>" for name, words in facts)
        + "</dl>",
        label_table(content.labels, content.examples) if content.labels else "",
        '<div class="charts wide">'
        + chart("Characters of the prompt", content.prompt_characters, "prompted", "characters")
        + chart("Characters of the answer", content.answer_characters, "prompted", "characters")
        + "</div>",
    )


def label_table(labels: Mapping[str, int], examples: int) -> str:
    shown = list(labels.items())[:SHOWN_LABELS]
    lines = "".join(
        f"<tr><th>{escape(label)}</th><td>{count:,}</td><td>{count / examples:.1%}</td></tr>" for label, count in shown
    )
    more = (
        f"<caption>The {len(shown)} most frequent of {len(labels):,} labels</caption>"
        if len(labels) > len(shown)
        else ""
    )
    return f'<div class="scroll"><table>{more}<thead><tr><th>label</th><th>examples</th><th>share</th></tr></thead><tbody>{lines}</tbody></table></div>'


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>"


def items(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def most_frequent(languages: Mapping[str, int]) -> str:
    shown = dict(list(languages.items())[:SHOWN_LANGUAGES])
    more = len(languages) - len(shown)
    return counted(shown) + (f" and {more} more" if more else "")


def counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.items())


def table(rows: Sequence[tuple[str, Distribution]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    lines = []
    for name, values in rows:
        ranks = (values.p50, values.p90, values.p95, values.p99, values.max, values.total)
        cells = f"<td>{values.mean:,.1f}</td>" + "".join(f"<td>{rank:,}</td>" for rank in ranks)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def chart(title: str, values: Distribution, style: str, x_label: str, limit: int | None = None) -> str:
    closed = [one for one in values.bins if one.end is not None]
    width = (closed[0].end or 1) - closed[0].start
    svg = columns(
        title,
        closed[0].start,
        width,
        [one.count for one in closed],
        above=sum(one.count for one in values.bins if one.end is None),
        limit=limit,
        style=style,
        x_label=x_label,
        description=f"{values.count} examples, from {values.min} to {values.max}, median {values.p50}",
    )
    return f'<figure class="card"><h3>{escape(title)}</h3>{svg}</figure>'


def minutes(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
