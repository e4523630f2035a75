"""The results of an ablation: paired differences within seeds, as tables and as a picture.

Tested in tests/launch/ablation/test_ablation.py.
"""

from __future__ import annotations

from pathlib import Path

from launch.ablation.config import AblateRecipe, Comparison
from runtime.errors import DataError
from runtime.figures import new_figure, save_figure

MEASURES = {
    "MRR": "mean reciprocal rank, mean of both directions",
    "MI": "mutual information of codewords and scenes, bits",
}
Arms = dict[str, dict[int, dict[str, float]]]
"""Arm -> seed -> measure -> value."""
Results = dict[str, Arms]
"""Condition -> arm -> seed -> measure -> value."""


def paired(differences: list[float]) -> tuple[float, float, float]:
    """Return the mean of paired differences and its 95 % interval by Student's t: (mean, low, high)."""
    from scipy import stats  # takes half a second to import

    mean = sum(differences) / len(differences)
    half_width = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return mean, mean - half_width, mean + half_width


def verdict(low: float, high: float) -> str:
    """Return whether an interval of differences is clear of zero: "resolved" or "unresolved"."""
    return "unresolved" if low <= 0 <= high else "resolved"


def values_of(arms: Arms, arm: str, measure: str) -> list[float]:
    """Return an arm's value of a measure for each seed.

    Empty if a seed lacks the measure: a model without a codebook has no information of its codewords.
    """
    values = [measures.get(measure) for measures in arms[arm].values()]
    return [value for value in values if value is not None] if None not in values else []


def differences(arms: Arms, arm: str, baseline: str, measure: str) -> list[float]:
    """Return the arm's value minus the baseline's for each seed; empty if one of them lacks the measure."""
    pair = (values_of(arms, arm, measure), values_of(arms, baseline, measure))
    return [arm_value - base_value for arm_value, base_value in zip(*pair, strict=True)] if all(pair) else []


def format_table(results: Results, recipe: AblateRecipe) -> str:
    """Return the tables of an ablation as Markdown.

    There is one table for each comparison, condition and measure. It holds each arm's mean, its paired difference from
    the baseline, and whether that is resolved. Then follow, for each further condition, how much larger its
    differences are than those of the first condition.

    Raises:
        DataError: Nothing was measured.
    """
    lines = []
    for name, comparison in recipe.comparisons.items():
        for condition, arms in results.items():
            for measure, about in MEASURES.items():
                base = values_of(arms, comparison.baseline, measure)
                if not base:
                    continue
                lines += [f"### {', '.join(part for part in (name, condition) if part)}: {about}", ""]
                lines += [
                    f"| arm | {measure} | minus `{comparison.baseline}` | 95 % interval | | predicted |",
                    "|---|---:|---:|---|---|---|",
                    f"| `{comparison.baseline}` | {sum(base) / len(base):.4f} | | | | |",
                ]
                for arm, predicted in comparison.arms.items():
                    values = values_of(arms, arm, measure)
                    if values:
                        minus = differences(arms, arm, comparison.baseline, measure)
                        lines.append(
                            f"| `{arm}` | {sum(values) / len(values):.4f} | {_format_interval(minus)} | {predicted} |"
                        )
                lines.append("")
        lines += _format_conditions(name, comparison, results)
    if not lines:
        raise DataError("nothing was measured, so there is no table; run the ablation first")
    count = len(next(iter(next(iter(results.values())).values())))
    return "\n".join([*lines, f"Seeds: {count}. Arms of a seed share starting weights, data order and draws."])


def _format_conditions(name: str, comparison: Comparison, results: Results) -> list[str]:
    lines = []
    first, *others = results
    for condition in others:
        lines += [
            f"### {name}: MRR above `{comparison.baseline}`, in {condition} more than in {first}",
            "",
            "| arm | more by | 95 % interval | |",
            "|---|---:|---|---|",
        ]
        for arm in comparison.arms:
            other, base = (differences(results[key], arm, comparison.baseline, "MRR") for key in (condition, first))
            increase = [a - b for a, b in zip(other, base, strict=True)]
            lines.append(f"| `{arm}` | {_format_interval(increase)} |")
        lines.append("")
    return lines


def _format_interval(values: list[float]) -> str:
    mean, low, high = paired(values)
    return f"{mean:+.4f} | {low:+.4f} to {high:+.4f} | {verdict(low, high)}"


def draw(results: Results, recipe: AblateRecipe, out: Path) -> None:
    """Draw the differences in mean reciprocal rank as a PNG file.

    There is one row an arm and one mark a condition: the mean difference with its interval, and faintly each seed's.
    """
    sizes = [len(comparison.arms) for comparison in recipe.comparisons.values()]
    figure, axes = new_figure(
        len(sizes), sharex=True, figsize=(8, 1.2 + sum(0.55 * size + 0.5 for size in sizes)),
        gridspec_kw={"height_ratios": sizes},
    )  # fmt: skip
    for axis, (name, comparison) in zip(axes[:, 0], recipe.comparisons.items(), strict=True):
        for number, (condition, arms) in enumerate(results.items()):
            offset = 0.5 * ((number + 0.5) / len(results) - 0.5)
            for row, arm in enumerate(comparison.arms):
                minus = differences(arms, arm, comparison.baseline, "MRR")
                mean, low, high = paired(minus)
                label = condition if condition and not row else None
                axis.errorbar(
                    mean,
                    row + offset,
                    xerr=[[mean - low], [high - mean]],
                    fmt="o",
                    capsize=3,
                    color=f"C{number}",
                    label=label,
                )
                axis.scatter(minus, [row + offset] * len(minus), s=12, alpha=0.35, color=f"C{number}")
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(comparison.arms)), list(comparison.arms))
        axis.set_ylim(len(comparison.arms) - 0.5, -0.5)
        axis.set_title(f"{name}: against {comparison.baseline}", fontsize="medium", loc="left")
    axes[-1, 0].set_xlabel("difference in mean reciprocal rank, with its 95 % interval; faint: each seed")
    if any(results):
        axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, out, dpi=120)
