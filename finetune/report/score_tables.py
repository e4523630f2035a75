"""Score tables of a page: recalls with their intervals, and paired differences between two runs' records.

Tested in tests/finetune/report/test_score_tables.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from retrieval.compare import compare_records
from retrieval.protocols import DIRECTIONS, RECALLS
from retrieval.records import KEYS, SETTING, read_record
from runtime.checkpoint import checkpoint_hash
from runtime.errors import LigatureError
from runtime.files import read_json
from runtime.page import escape

SHORT = {"image_to_text": "TR", "text_to_image": "IR", "both": ""}
"""Directions as the tables write them: TR retrieves texts for an image, IR an image for a text."""
STYLE = """
td.score { white-space: nowrap; font-variant-numeric: tabular-nums } td.score small { color: var(--soft); margin-left: 4px }
.better { color: var(--c2); font-weight: 600 } .worse { color: var(--bad); font-weight: 600 } .scores td:first-child { min-width: 130px }
"""
EXPLANATION = "Recalls in percent with 95 % intervals, and the median rank. TR: an image finds its texts; IR: a text finds its image."


@dataclass
class Score:
    """A score record, and where it is."""

    path: Path
    record: dict[str, Any]

    @property
    def setting(self) -> tuple[Any, ...]:
        """What it was scored on; records that share it are comparable."""
        return tuple(self.record[key] for key in SETTING)


def find_scores(run: Path) -> list[Score]:
    """Return the score records of a run's checkpoints that lie in its folder or beside it, by name.

    A record belongs to a run where the hash in it is that of a checkpoint that the run still has.
    """
    hashes = {
        checkpoint_hash(folder)
        for folder in (run / "checkpoints").glob("step-*")
        if (folder / "manifest.json").is_file()
    }
    scores = []
    for folder in (run, run.resolve().parent):
        for path in sorted(folder.glob("*.json")):
            try:
                record = read_json(path)
            except LigatureError:  # someone else's file
                continue
            if isinstance(record, dict) and not set(KEYS) - record.keys() and record["checkpoint"] in hashes:
                scores.append(Score(path, record))
    return scores


def read_scores(paths: list[Path]) -> list[Score]:
    """Return score records by their paths.

    Raises:
        LigatureError: a file is not a score record.
    """
    return [Score(path, read_record(path)) for path in paths]


def scores_html(scores: dict[str, list[Score]]) -> list[str]:
    """Return a table for each setting (data and protocol), with two rows for each record.

    Args:
        scores: name of a run -> its records. A single run is not named in the table.
    """
    settings: dict[tuple[Any, ...], list[tuple[str, Score]]] = {}
    for run, of_run in scores.items():
        for score in of_run:
            settings.setdefault(score.setting, []).append((run if len(scores) > 1 else "", score))
    if not settings:
        return []
    return ["<h2>Scores</h2>", *map(_setting_html, settings.values()), f"<p class=soft>{EXPLANATION}</p>"]


def _setting_html(rows: list[tuple[str, Score]]) -> str:
    first = rows[0][1].record
    title = (
        f"{first['dataset']} {first['split']}, protocol {first['protocol']}: {first['images']:,} images, "
        f"{first['captions']:,} captions ({first['captions_per_image']})"
    )
    head = "".join(f"<th>{name}</th>" for name in ("model", "", *RECALLS, "rank", "rsum"))
    body = "".join(_record_html(run, score) for run, score in rows)
    chance = "".join(
        f"<tr><th>{'chance' * (direction == DIRECTIONS[0])}</th><th>{SHORT[direction]}</th>"
        + "".join(f"<td class=score>{first['chance'][direction][name]:.2f}</td>" for name in RECALLS)
        + "<td></td><td></td></tr>"
        for direction in DIRECTIONS
    )
    return f"<p>{escape(title)}</p><table class=scores><tr>{head}</tr>{body}{chance}</table>"


def _record_html(run: str, score: Score) -> str:
    """Return the two rows of a record."""
    record, lines = score.record, []
    labels = (
        ([escape(run)] if run else []) + [escape(record["head"])],
        [escape(record["training"]), f"<code>{escape(score.path.name)}</code>"],
    )
    for label, direction in zip(labels, DIRECTIONS, strict=True):
        cells = "".join(
            f"<td class=score>{record[direction][name]:.1f}<small>{low:.1f}–{high:.1f}</small></td>"
            for name in RECALLS
            for low, high in [record[direction]["interval"][name]]
        )
        rsum = f"{record['rsum']:.1f}" if direction == DIRECTIONS[0] else ""
        lines.append(
            f"<tr><td>{'<br>'.join(label)}</td><th>{SHORT[direction]}</th>{cells}"
            f"<td class=score>{record[direction]['median_rank']:.1f}</td><td class=score>{rsum}</td></tr>"
        )
    return "".join(lines)


def differences_html(scores: dict[str, list[Score]]) -> list[str]:
    """Return a table of paired differences for each two runs that were scored alike, or the reason why two records have none.

    Args:
        scores: name of a run -> its records.
    """
    parts = []
    for (first, ours), (second, theirs) in combinations(scores.items(), 2):
        for one, other in pair_scores(ours, theirs):
            try:
                comparison = compare_records(one.path, other.path)
            except LigatureError as error:  # such as ranks that were not kept beside a record
                parts.append(f"<p class=note>{escape(f'{first} and {second}: no paired difference: {error}')}</p>")
                continue
            parts.append(_difference_html(f"{second} - {first}", comparison, one.record["head"], other.record["head"]))
    return ["<h2>Paired differences</h2>", *parts] if parts else []


def pair_scores(ours: list[Score], theirs: list[Score]) -> list[tuple[Score, Score]]:
    """Return the records of two runs to hold against each other: of one setting and one head, or the only ones of a setting."""
    pairs = []
    for setting in dict.fromkeys(score.setting for score in ours):
        left, right = ([score for score in side if score.setting == setting] for side in (ours, theirs))
        if len(left) == len(right) == 1:
            pairs.append((left[0], right[0]))
        else:
            heads = {score.record["head"]: score for score in right}
            pairs += [(score, heads[score.record["head"]]) for score in left if score.record["head"] in heads]
    return pairs


def _difference_html(title: str, comparison: dict[str, Any], first_head: str, second_head: str) -> str:
    heads = first_head if first_head == second_head else f"{second_head} and {first_head}"
    where = f"{comparison['dataset']} {comparison['split']}, protocol {comparison['protocol']}, {comparison['images']:,} images"
    rows = []
    for row in comparison["differences"]:
        # All measures are recalls and reciprocal ranks, of which higher is better.
        kind = {"higher": "better", "lower": "worse"}.get(row["verdict"], "unresolved")
        low, high = row["interval"]
        rows.append(
            f"<tr><th>{escape(SHORT[row['direction']] + ' ' + row['measure'])}</th><td class=score>{row['first']:.2f}</td>"
            f"<td class=score>{row['second']:.2f}</td><td class=score><span class={kind}>{row['difference']:+.2f}</span>"
            f"<small>{low:+.2f} to {high:+.2f}</small></td><td class=score>{row['p']:.4f}</td>"
            f"<td>{escape(row['verdict'])}</td></tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("", "first", "second", "difference, 95 %", "p", "second is"))
    return f"<p><b>{escape(title)}</b> <span class=soft>{escape(f'{heads}; {where}')}</span></p><table><tr>{head}</tr>{''.join(rows)}</table>"
