"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import DataError
from runtime.files import replaced_file
from runtime.metrics import read_metrics

PANELS = {
    "loss": ["train/loss"],
    "contrastive": ["train/contrastive"],
    "matching": ["train/matching"],
    "masked language": ["train/masked_language"],
    "codebook": ["train/codebook"],
    "validation R@10, % (solid: image to text, dashed: text to image)": [
        "validation/image_to_text_R@10",
        "validation/text_to_image_R@10",
    ],
}
"""Title -> figures of metrics.jsonl, the first one solid, the second dashed."""


def plot_curves(runs: list[Path], out: Path) -> None:
    """One picture (PNG): a panel a figure, a colour a run. Raises DataError where a run has logged nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    histories = {run: read_metrics(run) for run in runs}
    if empty := [run for run, lines in histories.items() if not lines]:
        raise DataError(f"{empty[0]} has no metrics.jsonl, or nothing in it yet; give a run's folder")
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 7.5))
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for number, lines in enumerate(histories.values()):
            for name, style in zip(names, ("-", "--"), strict=False):
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    marker = "o" if name.startswith("validation") else None
                    steps, values = zip(*points, strict=True)
                    axis.plot(steps, values, style, color=f"C{number}", marker=marker, markersize=3, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    handles = [pyplot.Line2D([], [], color=f"C{number}", label=run.name) for number, run in enumerate(runs)]
    figure.legend(handles=handles, loc="lower center", ncols=len(runs), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    with replaced_file(out) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    pyplot.close(figure)
