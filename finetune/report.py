"""Pictures of runs."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import DataError
from runtime.files import replaced_file
from runtime.metrics import read_metrics

PANELS = {
    "loss": ("train/loss", "train/contrastive", "train/matching", "train/masked_language", "train/codebook"),
    "validation R@10, %": ("validation/image_to_text_R@10", "validation/text_to_image_R@10"),
}


def plot_curves(runs: list[Path], out: Path) -> None:
    """One picture (PNG): a panel for the losses and one for validation, a colour for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(6.4 * len(PANELS), 4.2))
    styles = ("-", "--", ":", "-.", (0, (1, 3)))
    for number, run in enumerate(runs):
        lines = read_metrics(run)
        if not lines:
            raise DataError(f"{run} has no metrics.jsonl, or nothing in it yet; give a run's folder")
        for panel, (title, names) in zip(axes, PANELS.items(), strict=True):
            for style, name in zip(styles, names, strict=False):
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    label = f"{run.name}: {name.split('/')[1].replace('_', ' ')}"
                    panel.plot(
                        *zip(*points, strict=True), linestyle=style, color=f"C{number}", label=label, linewidth=1.2
                    )
            panel.set(title=title, xlabel="step")
            panel.grid(alpha=0.3)
    axes[0].set_yscale("log")
    for panel in axes:
        panel.legend(fontsize=7)
    figure.tight_layout()
    with replaced_file(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
