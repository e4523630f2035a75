"""What arms came to: paired differences within seeds, as tables and as a picture."""

from __future__ import annotations

from pathlib import Path

from launch.ablation.config import AblateRecipe, Comparison
from runtime.errors import DataError
from runtime.figures import new_figure, save_figure

MEASURES = {"MRR": "mean reciprocal rank, mean of both ways", "MI": "mutual information of codewords and scenes, bits"}
Found = dict[str, dict[str, dict[int, dict[str, float]]]]
"""condition -> arm -> seed -> measure -> value"""


def paired(differences: list[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval by Student's t."""
    from scipy import stats  # half a second to import

    mean = sum(differences) / len(differences)
    reach = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return mean, mean - reach, mean + reach


def verdict(low: float, high: float) -> str:
    return "unresolved" if low <= 0 <= high else "resolved"


def values_of(arms: dict[str, dict[int, dict[str, float]]], arm: str, measure: str) -> list[float]:
    """Of each seed; empty where a seed has no such measure (no codebook, no information of its codewords)."""
    found = [one.get(measure) for one in arms[arm].values()]
    return [value for value in found if value is not None] if None not in found else []


def differences(arms: dict[str, dict[int, dict[str, float]]], arm: str, baseline: str, measure: str) -> list[float]:
    """The arm's value minus the baseline's, of each seed."""
    pair = (values_of(arms, arm, measure), values_of(arms, baseline, measure))
    return [one - other for one, other in zip(*pair, strict=True)] if all(pair) else []


def table(found: Found, recipe: AblateRecipe) -> str:
    """One table a comparison, condition and measure: each arm's mean, its paired difference from the baseline, and whether that is
    resolved; then how far the differences of other conditions are from those of the first."""
    lines = []
    for name, comparison in recipe.comparisons.items():
        for condition, arms in found.items():
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
                        apart = differences(arms, arm, comparison.baseline, measure)
                        lines.append(f"| `{arm}` | {sum(values) / len(values):.4f} | {_spell(apart)} | {predicted} |")
                lines.append("")
        lines += _between_conditions(name, comparison, found)
    if not lines:
        raise DataError("nothing was measured; there is no table")
    count = len(next(iter(next(iter(found.values())).values())))
    return "\n".join([*lines, f"Seeds: {count}. Arms of a seed share starting weights, data order and draws."])


def _between_conditions(name: str, comparison: Comparison, found: Found) -> list[str]:
    lines = []
    first, *others = found
    for condition in others:
        lines += [
            f"### {name}: MRR above `{comparison.baseline}`, in {condition} more than in {first}",
            "",
            "| arm | more by | 95 % interval | |",
            "|---|---:|---|---|",
        ]
        for arm in comparison.arms:
            there, here = (differences(found[one], arm, comparison.baseline, "MRR") for one in (condition, first))
            lines.append(f"| `{arm}` | {_spell([one - other for one, other in zip(there, here, strict=True)])} |")
        lines.append("")
    return lines


def _spell(values: list[float]) -> str:
    mean, low, high = paired(values)
    return f"{mean:+.4f} | {low:+.4f} to {high:+.4f} | {verdict(low, high)}"


def draw(found: Found, recipe: AblateRecipe, out: Path) -> None:
    """A row an arm, a mark a condition: the mean difference in mean reciprocal rank with its interval; faint, each seed's."""
    sizes = [len(comparison.arms) for comparison in recipe.comparisons.values()]
    figure, axes = new_figure(
        len(sizes), sharex=True, figsize=(8, 1.2 + sum(0.55 * size + 0.5 for size in sizes)),
        gridspec_kw={"height_ratios": sizes},
    )  # fmt: skip
    for axis, (name, comparison) in zip(axes[:, 0], recipe.comparisons.items(), strict=True):
        for number, (condition, arms) in enumerate(found.items()):
            offset = 0.5 * ((number + 0.5) / len(found) - 0.5)
            for row, arm in enumerate(comparison.arms):
                apart = differences(arms, arm, comparison.baseline, "MRR")
                mean, low, high = paired(apart)
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
                axis.scatter(apart, [row + offset] * len(apart), s=12, alpha=0.35, color=f"C{number}")
        axis.axvline(0, color="grey", linewidth=1)
        axis.set_yticks(range(len(comparison.arms)), list(comparison.arms))
        axis.set_ylim(len(comparison.arms) - 0.5, -0.5)
        axis.set_title(f"{name}: against {comparison.baseline}", fontsize="medium", loc="left")
    axes[-1, 0].set_xlabel("difference in mean reciprocal rank, with its 95 % interval; faint: each seed")
    if any(found):
        axes[0, 0].legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, out, dpi=120)
