"""`ligature plot`: the curves of one run or several as one picture."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import DataError
from runtime.figures import new_figure, pyplot, save_figure
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
"""Title of a panel -> names of its figures in metrics.jsonl: the first is drawn solid, the second dashed."""


def plot_curves(runs: list[Path], out: Path) -> None:
    """Write one picture (PNG) with a panel for each entry of PANELS and a colour for each run.

    Args:
        runs: folders of runs.
        out: the file to write.

    Raises:
        DataError: a run has logged nothing.
    """
    metrics = {run: read_metrics(run) for run in runs}
    if empty := [run for run, lines in metrics.items() if not lines]:
        raise DataError(f"{empty[0]} has no metrics.jsonl, or nothing in it yet; give a run's folder")
    figure, axes = new_figure(2, 3, figsize=(15, 7.5))
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for number, lines in enumerate(metrics.values()):
            for name, style in zip(names, ("-", "--"), strict=False):
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    # Validations are few: a dot shows where each one is.
                    marker = "o" if name.startswith("validation") else None
                    steps, values = zip(*points, strict=True)
                    axis.plot(steps, values, style, color=f"C{number}", marker=marker, markersize=3, linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    handles = [pyplot().Line2D([], [], color=f"C{number}", label=run.name) for number, run in enumerate(runs)]
    figure.legend(handles=handles, loc="lower center", ncols=len(runs), frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    save_figure(figure, out, dpi=90)
