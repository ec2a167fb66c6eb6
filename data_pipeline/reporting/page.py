"""The page itself: sections of text, tables and pictures in one HTML file."""

import base64
import dataclasses
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from data_pipeline.reporting.figures import (
    MAX_PANELS,
    Histogram,
    drop_bars,
    half_octaves,
    ledger_areas,
    length_histograms,
    shard_bars,
    survival_lines,
)
from data_pipeline.reporting.records import LedgerEntry, Shards

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2126; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem;
  border-bottom: 1px solid #d5d9de; }
img { max-width: 100%; } p { max-width: 46rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: 0.15rem 0.8rem; text-align: right; border-bottom: 1px solid #e6e9ec; }
th:first-child, td:first-child { text-align: left; } td.name { text-align: left; }
"""
MAX_BARS = 40


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it, as HTML."""

    title: str
    parts: tuple[str, ...]


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page."""
    body = "\n".join(
        f"<section><h2>{escape(section.title)}</h2>\n{''.join(section.parts)}</section>"
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n"
        "</body></html>\n"
    )


def curation_sections(folder: str, report: dict[str, Any]) -> list[Section]:
    """Return what a curation kept, dropped and why."""
    return [
        _kept_section(folder, report),
        _drop_section(folder, report),
        _length_section(folder, report),
    ]


def shard_sections(shards: Sequence[Shards]) -> list[Section]:
    """Return documents, tokens and lengths per domain of token shards."""
    rows = []
    total = sum(int(shard.lengths_tokens.sum(dtype=np.int64)) for shard in shards)
    for shard in shards:
        lengths = shard.lengths_tokens
        tokens = int(lengths.sum(dtype=np.int64))
        middle, long = np.percentile(lengths, [50, 95])
        rows.append(
            [
                *(shard.domain, len(lengths), tokens, _percent(tokens, total)),
                *(int(middle), int(long), int(lengths.max()), shard.num_files),
            ]
        )
    header = ["domain", "documents", "tokens", "share of tokens"]
    header += ["median tokens", "95th percentile", "longest", "shards"]
    panels = [(s.domain, half_octaves(s.lengths_tokens), None) for s in shards]
    return [
        Section(
            "Token shards by domain",
            (_table(header, rows), _picture(shard_bars(shards), "documents and tokens per domain")),
        ),
        Section(
            "Lengths of tokenized documents",
            (
                _picture(length_histograms(panels, "tokens"), "documents by length in tokens"),
                _left_out(panels),
            ),
        ),
    ]


def run_sections(run: str, entries: Sequence[LedgerEntry]) -> list[Section]:
    """Return the tokens per domain over the time of a run."""
    title = f"Tokens per domain over training: {run}"
    if not entries:
        return [Section(title, (_text("The run has no ledger yet: no step was logged."),))]
    last = entries[-1]
    total = sum(last.tokens.values())
    rows = [[d, tokens, _percent(tokens, total)] for d, tokens in sorted(last.tokens.items())]
    text = f"After step {last.step:,}, in phase {last.phase}: {total:,} tokens consumed."
    return [
        Section(
            title,
            (
                _text(text),
                _table(["domain", "tokens", "share"], rows),
                _picture(ledger_areas(entries), "tokens per domain over steps"),
            ),
        )
    ]


def _kept_section(folder: str, report: dict[str, Any]) -> Section:
    read, kept = report["domains"]["read"], report["domains"]["kept"]
    rows = []
    for domain in sorted(read):
        before, after = read[domain], kept.get(domain, {"documents": 0, "characters": 0})
        rows.append(
            [
                *(domain, before["documents"], after["documents"]),
                _percent(after["documents"], before["documents"]),
                *(before["characters"], after["characters"]),
                _percent(after["characters"], before["characters"]),
            ]
        )
    totals = report["totals"]
    text = (
        f"{totals['read']['documents']:,} documents read = {totals['kept']['documents']:,} kept + "
        f"{totals['dropped']['documents']:,} dropped. {totals['read']['characters']:,} characters "
        f"read = {totals['kept']['characters']:,} kept + {totals['dropped']['characters']:,} "
        f"dropped + {totals['edited']['characters']:,} edited away."
    )
    header = ["domain", "documents read", "kept", "%", "characters read", "kept", "%"]
    skipped = [[reason, count] for reason, count in sorted(report.get("skipped", {}).items())]
    parts = [_text(text), _table(header, rows)]
    if skipped:
        parts.append(_text("Records that were no documents and are not counted as read:"))
        parts.append(_table(["reason", "records"], skipped))
    return Section(f"What was kept: {folder}", tuple(parts))


def _drop_section(folder: str, report: dict[str, Any]) -> Section:
    names = ["read", *(step["name"] for step in report["steps"])]
    sums: dict[tuple[str, str], list[int]] = {}
    for row in report["dropped"]:
        entry = sums.setdefault((row["step"], row["reason"]), [0, 0])
        entry[0] += row["documents"]
        entry[1] += row["characters"]
    title = f"Duplicates and drops by step and reason: {folder}"
    if not sums:
        return Section(title, (_text("Nothing was dropped."),))
    keys = sorted(sums, key=lambda key: (names.index(key[0]), -sums[key][0], key[1]))
    total = report["totals"]["read"]["documents"]
    rows = [[*key, *sums[key], _percent(sums[key][0], total)] for key in keys]
    header = ["step", "reason", "documents", "characters", "% of read"]
    shares = _survival(names, report)
    bars = [(*key, sums[key][0]) for key in keys]
    return Section(
        title,
        (
            _picture(drop_bars(bars[:MAX_BARS]), "documents dropped by step and reason"),
            _picture(survival_lines(names, shares), "documents that remain after each step"),
            _table(["domain", *names], _survival_rows(shares)),
            _table(header, rows),
        ),
    )


def _survival_rows(shares: dict[str, list[float]]) -> list[list[str]]:
    return [[domain, *(f"{100 * x:.1f}%" for x in of)] for domain, of in shares.items()]


def _survival(names: list[str], report: dict[str, Any]) -> dict[str, list[float]]:
    """Return domain -> share of its documents after each step."""
    shares = {}
    for domain, counts in sorted(report["domains"]["read"].items()):
        remaining = counts["documents"]
        shares[domain] = []
        for name in names:
            remaining -= sum(
                row["documents"]
                for row in report["dropped"]
                if (row["step"], row["domain"]) == (name, domain)
            )
            shares[domain].append(remaining / counts["documents"])
    return shares


def _length_section(folder: str, report: dict[str, Any]) -> Section:
    lengths = report["length_half_octaves"]
    panels = [
        (domain, _histogram(lengths["kept"].get(domain, {})), _histogram(before))
        for domain, before in sorted(lengths["read"].items())
    ]
    picture = _picture(length_histograms(panels, "characters"), "documents by length in characters")
    return Section(f"Lengths, read and kept: {folder}", (picture, _left_out(panels)))


def _histogram(counts: dict[str, int]) -> Histogram:
    return {int(key): count for key, count in counts.items()}


def _left_out(panels: Sequence[object]) -> str:
    missing = len(panels) - MAX_PANELS
    return _text(f"{missing} more domains are not drawn.") if missing > 0 else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def _text(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"


def _cell(value: str | int) -> str:
    if isinstance(value, int):
        return f"<td>{value:,}</td>"
    kind = "" if value.endswith("%") or value == "-" else ' class="name"'
    return f"<td{kind}>{escape(value)}</td>"


def _picture(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{data}"></p>\n'
