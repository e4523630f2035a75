"""Write a page about a shard folder: counts, histograms, and a grid of samples, in one HTML file that loads nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.making.inspection import Measured, captions_of, describe, measure
from data_tools.shards.manifest import Manifest, read_index, read_manifest
from runtime.errors import DataError
from runtime.page import escape, render_table
from runtime.page import write_page as write_document

if TYPE_CHECKING:
    import numpy as np

SHOWN = 60
"""Samples in the grid, spread evenly over the folder."""
THUMBNAIL = 200
"""Pixels of a thumbnail's longer side."""
BARS = 40
"""Maximum number of bars in a histogram."""

STYLE = """
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 18px }
.numbers .card { padding: 10px 18px; min-width: 120px }
.numbers b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums }
.charts { --cell: 360px; align-items: start } .samples { --cell: 190px }
figure { padding: 12px 14px 8px }
figcaption { font-weight: 600; margin-bottom: 6px }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif }
svg rect { fill: var(--mark) } svg rect:hover { opacity: .7 } svg line { stroke: var(--line) }
.samples .card { padding: 10px; font-size: 13px }
.samples img { display: block; width: 100%; height: 150px; object-fit: contain; background: var(--page); border-radius: 4px }
.samples p { margin: 6px 0 0 } .samples code { display: block; margin-top: 8px }
"""
"""What this page adds to the style of every page."""


def write_page(folder: Path, page: Path) -> dict[str, Any]:
    """Write the page of a shard folder.

    Args:
        folder: The shard folder.
        page: File to write.

    Returns:
        What `describe` returned for the folder.
    """
    manifest = read_manifest(folder)
    measured = measure(manifest)
    description = describe(folder, measured)
    name = manifest.folder.resolve().name
    write_document(page, f"{name}: shards", _blocks(name, manifest, description, measured), STYLE)
    return description


def _blocks(name: str, manifest: Manifest, description: dict[str, Any], measured: Measured) -> list[str]:
    """Return the body of the page as pieces of HTML."""
    import numpy as np

    small = manifest.bytes < 1e8
    size = ("megabytes", f"{manifest.bytes / 1e6:,.3g}") if small else ("gigabytes", f"{manifest.bytes / 1e9:,.3f}")
    numbers = [
        ("samples", f"{manifest.samples:,}"), ("captions", f"{manifest.captions:,}"),
        ("captions per image", f"{manifest.captions / max(1, manifest.samples):.2f}"),
        ("shards", f"{len(manifest.shards):,}"), size,
        *((image_format, f"{count:,}") for image_format, count in description["image_formats"].items()),
    ]  # fmt: skip
    shorter = np.minimum(measured.width, measured.height)
    read_note = f" (of {measured.samples_read:,} samples)" if measured.samples_read < manifest.samples else ""
    charts = [
        histogram(f"Words per caption{read_note}", measured.caption_words, whole=True),
        histogram("Captions per image", measured.captions_per_image, whole=True),
        histogram("Shorter side, pixels", shorter, whole=True),
        histogram("Longer side, pixels", np.maximum(measured.width, measured.height), whole=True),
        histogram("Width divided by height", measured.width / np.maximum(1, measured.height)),
        histogram("Kilobytes per image", measured.image_bytes / 1000),
    ]
    return [
        f"<h1>{escape(name)}</h1>",
        f'<div class="soft">fingerprint {manifest.fingerprint}</div>',
        '<div class="numbers">'
        + "".join(f'<div class="card"><b>{value}</b>{escape(label)}</div>' for label, value in numbers)
        + "</div>",
        f'<h2>Distributions</h2><div class="grid charts">{"".join(charts)}</div>',
        "<h2>Source</h2>"
        + render_table([(key, value) for key, value in description["source"].items() if value is not None]),
        "<h2>Left out</h2>"
        + (
            render_table([(f"{n:,}", reason) for reason, n in manifest.dropped.items()])
            if manifest.dropped
            else "<p>Nothing.</p>"
        ),
        f'<h2>Samples, spread evenly</h2><div class="grid samples">{"".join(_samples(manifest))}</div>',
    ]


def histogram(title: str, values: np.ndarray, whole: bool = False) -> str:
    """Return one chart as HTML.

    Where the largest values lie far out, the axis ends at the 99.5th percentile. The last bar then holds the rest, and says so.

    Args:
        title: Heading of the chart.
        values: (n,) the numbers to count.
        whole: Whether the values are whole numbers, so that each bar spans a whole number of them.
    """
    head = f"<figure><figcaption>{escape(title)}</figcaption>"
    if not len(values):
        return f'{head}<div class="soft">none</div></figure>'
    least, most = float(values.min()), float(values.max())
    if least == most:
        return f'{head}<div class="soft">all {least:,.5g}</div></figure>'
    return f"{head}{_draw_bars(values, least, most, whole)}</figure>"


def _draw_bars(values: np.ndarray, least: float, most: float, whole: bool) -> str:
    """Return the bars and the axis of a histogram as SVG."""
    import numpy as np

    width, height, left, bottom = 420, 150, 44, 20  # units of the SVG; left and bottom hold the labels
    cap = float(np.quantile(values, 0.995))
    beyond = most > least + 1.5 * (cap - least) and cap > least
    end = cap if beyond else most
    if whole:
        step = max(1, -(-int(end - least + 1) // BARS))
        edges = np.arange(least, end + 1 + step, step)[: int((end - least) // step) + 2].astype(float)
    else:
        edges = np.linspace(least, end, BARS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1] - (1 if whole else 0)), edges)
    bar_width, tallest = (width - left) / len(counts), max(1, int(counts.max()))
    bars = []
    for number, count in enumerate(counts.tolist()):
        bar_height = (height - bottom - 8) * count / tallest
        low, high = edges[number], edges[number + 1] - (1 if whole else 0)
        if beyond and number == len(counts) - 1:
            span = f"{low:,.4g} or more"
        else:
            span = f"{low:,.5g}" if whole and low == high else f"{low:,.4g} to {high:,.4g}"
        bars.append(
            f'<rect x="{left + number * bar_width + 0.5:.1f}" y="{height - bottom - bar_height:.1f}" '
            f'width="{max(0.8, bar_width - 1):.1f}" height="{bar_height:.1f}"><title>{span}: {count:,}</title></rect>'
        )
    middle = float(np.median(values))
    ticks = [(left, "start", f"{least:,.4g}"), (width, "end", f"{end:,.4g}{'+' if beyond else ''}")]
    texts = "".join(f'<text x="{x}" y="{height - 5}" text-anchor="{anchor}">{word}</text>' for x, anchor, word in ticks)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"><line x1="{left}" x2="{width}" y1="{height - bottom}" '
        f'y2="{height - bottom}"/><text x="{left - 6}" y="14" text-anchor="end">{tallest:,}</text>'
        f'<text x="{(left + width) / 2}" y="{height - 5}" text-anchor="middle">median {middle:,.4g}</text>'
        f"{''.join(bars)}{texts}</svg>"
    )


def _samples(manifest: Manifest) -> list[str]:
    """Return the cards of at most SHOWN samples. The card of a sample that cannot be read gives the reason."""
    step = max(1, manifest.samples / SHOWN)
    chosen = sorted({int(number * step) for number in range(min(SHOWN, manifest.samples))})
    cards, first = [], 0
    for shard in manifest.shards:
        rows = [number - first for number in chosen if first <= number < first + shard.samples]
        first += shard.samples
        if not rows:
            continue
        index = read_index(manifest.folder / shard.index)
        with open(manifest.folder / shard.name, "rb") as tar:
            for row in rows:
                tar.seek(int(index.image_offset[row]))
                image = tar.read(int(index.image_size[row]))
                tar.seek(int(index.text_offset[row]))
                text = tar.read(int(index.text_size[row]))
                cards.append(_sample(index.key[row], image, text, index.text_format[row]))
    return cards


def _sample(key: str, image: bytes, text: bytes, text_format: str) -> str:
    try:
        captions = captions_of(text, text_format, key)
        picture = f'<img alt="" src="{_thumbnail(image)}">'
    except (ValueError, DataError) as error:
        captions, picture = [], f"<p>cannot be read: {escape(error)}</p>"
    texts = "".join(f"<p>{escape(caption)}</p>" for caption in captions[:5])
    return f'<div class="card">{picture}{texts}<code>{escape(key)}</code></div>'


def _thumbnail(raw: bytes) -> str:
    from data_tools.pixels.decode import data_url, open_image, upright

    return data_url(upright(open_image(raw, least=THUMBNAIL)), THUMBNAIL)
