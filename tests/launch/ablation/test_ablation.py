"""Ablations: what is run, what is compared, and when a difference counts as resolved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from launch.ablation.codeword_information import corrected, information
from launch.ablation.config import AblateRecipe, Comparison
from launch.ablation.run import check_records, format_options, read_results, run_arms
from launch.ablation.table import differences, paired, values_of, verdict
from launch.ablation.workers import Workers
from launch.cli import main
from launch.stages import read_stage
from runtime.errors import LigatureError, RecipeError
from runtime.files import write_json

ARMS = {"a": {}, "b": {"objectives.contrastive.intra_modal": True}}


def expected(**arms: str) -> dict[str, Comparison]:
    return {"try": Comparison("a", arms or {"b": "better"})}


def recipe(folder, **more) -> AblateRecipe:
    settings = {"base": "pretrain/demo.yaml", "arms": ARMS, "seeds": [0, 1, 2], "comparisons": expected()} | more
    return AblateRecipe(name="try", runs=str(folder), data="shards", **settings)


def fake(commands: list[list[str]], worth):
    """Stands in for the commands: notes them, and leaves a record with the arm's worth."""

    def start(*command: str) -> None:
        commands.append(list(command))
        if command[0] == "evaluate":
            out = command[command.index("--out") + 1]
            name = out.rsplit("/", 1)[1].removesuffix(".json")
            way = {"mean_reciprocal_rank": worth(name)}
            write_json(out, {"image_to_text": way, "text_to_image": way})

    return start


def test_arms_share_seeds_and_differ_in_their_keys_alone(tmp_path, capsys):
    commands: list[list[str]] = []
    run_arms(recipe(tmp_path), fake(commands, lambda name: 0.5))
    runs = [command for command in commands if command[0] == "pretrain"]
    assert len(runs) == 6 and len(commands) == 12
    for first, second in zip(runs[::2], runs[1::2], strict=True):
        assert first[first.index("--training.seed") + 1] == second[second.index("--training.seed") + 1]
        assert [part for part in second if part not in first][-2:] == ["--objectives.contrastive.intra_modal", "true"]
    commands.clear()
    run_arms(recipe(tmp_path), fake(commands, lambda name: 0.5))
    assert not commands, "what stands is not done again"


def test_parallel_jobs_give_the_same_table(tmp_path, capsys):
    noise = {
        name: number * 0.01
        for number, name in enumerate(("a-seed0", "b-seed0", "a-seed1", "b-seed1", "a-seed2", "b-seed2"))
    }
    tables = [run_arms(recipe(tmp_path / str(jobs), jobs=jobs), fake([], noise.__getitem__)) for jobs in (1, 3)]
    assert tables[0] == tables[1] and "6 of 6 runs, 0:00 left" in capsys.readouterr().out


def test_a_difference_in_every_seed_is_resolved_and_one_within_the_noise_is_not(tmp_path):
    noise = {"seed0": 0.0, "seed1": 0.1, "seed2": -0.1}

    def worth(gain):
        return lambda name: 0.5 + noise[name.split("-")[-1]] + gain(name)

    sure = run_arms(
        recipe(tmp_path / "1"),
        fake([], worth(lambda name: 0.02 + 0.001 * ("seed1" in name) if "b-" in name else 0)),
    )
    assert "| +0.0203 |" in sure and "| resolved | better |" in sure
    unsure = run_arms(recipe(tmp_path / "2"), fake([], worth(lambda name: noise[name[-5:]] if "b-" in name else 0)))
    assert "| unresolved |" in unsure and (tmp_path / "2" / "try" / "table.md").read_text().startswith("### try")


def test_conditions_are_compared_within_themselves(tmp_path):
    text = run_arms(
        recipe(tmp_path, conditions={"clean": {"data.train": "x"}, "wrong": {"data.train": "y"}}),
        fake([], lambda name: 0.9 if name.startswith("clean") else 0.4),
    )
    assert "### try, clean" in text and "### try, wrong" in text and text.count("+0.0000") >= 2
    assert (tmp_path / "try" / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_what_one_condition_adds_to_a_difference_is_paired_too(tmp_path):
    """b is above a by 0.1 with clean captions and by 0.3 with wrong ones, whatever the seed's level: 0.2 more."""
    level = {"seed0": 0.1, "seed1": 0.3, "seed2": 0.2}

    def worth(name):
        condition, arm, seed = name.split("-")
        return level[seed] + (arm == "b") * (0.1 if condition == "clean" else 0.3)

    conditions = {"clean": {"data.train": "x"}, "wrong": {"data.train": "y"}}
    text = run_arms(recipe(tmp_path, conditions=conditions), fake([], worth))
    section = text.split("### try: MRR above `a`, in wrong more than in clean")[1]
    assert "| `b` | +0.2000 | +0.2000 to +0.2000 | resolved |" in section


@pytest.mark.parametrize("count", [2, 5, 8, 30])
def test_the_interval_is_students_t(count):
    values = [math.sin(7 * number) for number in range(count)]
    mean, low, high = paired(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((wanted.low, wanted.high), rel=1e-5) and mean == pytest.approx(
        sum(values) / count
    )
    assert verdict(-1, 1) == "unresolved" and verdict(0.1, 1) == verdict(-1, -0.1) == "resolved"


def test_information_is_counted_right_and_is_zero_between_independent_variables():
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(4, (4000,), generator=generator)
    assert information(code, code) == pytest.approx(2.0, abs=0.01)
    assert information(code, code // 2) == pytest.approx(1.0, abs=0.01)
    found = []
    for _ in range(20):
        few = torch.randint(64, (300,), generator=generator)
        stranger = torch.randint(3, (300,), generator=generator)
        assert information(few, stranger) > 0.15, "few samples look like information"
        found.append(corrected(few, stranger))
    assert abs(sum(found)) / len(found) < 0.03


def test_recipes_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="comparison try names 'c', which is none of the arms: a, b"):
        recipe(tmp_path, comparisons={"try": Comparison("c", {"a": ""})})
    with pytest.raises(RecipeError, match="comparison try names 'c'"):
        recipe(tmp_path, comparisons=expected(c=""))
    with pytest.raises(RecipeError, match="comparison try has no arms to compare with 'a'"):
        recipe(tmp_path, comparisons={"try": Comparison("a", {})})
    with pytest.raises(RecipeError, match="conditions is not set"):
        recipe(tmp_path, conditions={})
    with pytest.raises(RecipeError, match="paired differences need two"):
        recipe(tmp_path, seeds=[1])


def test_an_arm_of_several_comparisons_runs_once(tmp_path):
    commands: list[list[str]] = []
    arms = ARMS | {"c": {"objectives.codebook.weight": 0.25}}
    twice = {"one": Comparison("a", {"b": "above"}), "two": Comparison("b", {"c": "below", "a": ""})}
    text = run_arms(recipe(tmp_path, arms=arms, comparisons=twice), fake(commands, lambda name: 0.5))
    assert sum(command[0] == "pretrain" for command in commands) == 9
    assert "### one" in text and "### two" in text and text.count("minus `b`") == 1 and "| below |" in text


def test_shipped_ablations_are_recipes_whose_arms_are_recipes():
    shipped = read_stage("ablate", ["--config", "ablate/codis.yaml"])
    assert {arm for one in shipped.comparisons.values() for arm in (one.baseline, *one.arms)} == set(shipped.arms)
    assert all(all(one.arms.values()) for one in shipped.comparisons.values()), "a prediction is written for every arm"
    *_, shared = shipped.conditions.values()
    for changes in shipped.arms.values():
        read_stage("pretrain", ["--config", shipped.base, *format_options(shared | changes)])


def test_an_arm_with_an_unknown_key_stops_before_anything_runs(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(
        json.dumps(
            {"base": "pretrain/demo.yaml", "data": "x", "arms": {"a": {"objectives.nothing": 1}}}
            | {"comparisons": {"one": {"baseline": "a", "arms": {"a": ""}}}}
        )
    )
    assert main(["ablate", "--config", str(tmp_path / "bad.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    assert "objectives.nothing" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_records_of_another_recipe_are_refused(tmp_path):
    commands: list[list[str]] = []
    start = fake(commands, lambda name: 0.5)
    run_arms(recipe(tmp_path), start)
    for changed in (
        {"arms": ARMS | {"b": {"objectives.codebook.weight": 0.25}}},
        {"arms": {"b": ARMS["b"], "a": {"objectives.codebook.weight": 0.25}}},
        {"comparisons": expected(b="worse")},
        {"comparisons": {"other": Comparison("a", {"b": "better"})}},
        {"base": "pretrain/shapes_ablation.yaml"},
        {"seeds": [0, 1]},
    ):
        with pytest.raises(RecipeError, match=f"records of another recipe \\({next(iter(changed))}: "):
            run_arms(recipe(tmp_path, **changed), start)
    commands.clear()
    more = {"arms": ARMS | {"c": {"objectives.codebook.weight": 0.25}}, "seeds": [0, 1, 2, 3]}
    run_arms(recipe(tmp_path, comparisons=expected(b="better", c="worse"), **more), start)
    assert (
        sum(command[0] == "pretrain" for command in commands) == 6
    )  # one arm of three seeds, and three of the new seed


def test_an_ablation_continues_elsewhere_from_results_and_recipe(tmp_path):
    """Seeds run on two machines, the later ones first, come to the table of one machine."""
    noise = {"0": 0.0, "1": 0.1, "2": -0.1, "3": 0.05}

    def worth(name):
        return 0.5 + noise[name[-1]] + (0.02 + 0.1 * noise[name[-1]] if name.startswith("b") else 0)

    whole = run_arms(recipe(tmp_path / "whole", seeds=[0, 1, 2, 3]), fake([], worth))
    run_arms(recipe(tmp_path / "here", seeds=[2, 3]), fake([], worth))
    there = tmp_path / "there" / "try"
    there.mkdir(parents=True)
    (there / "results.json").write_bytes((tmp_path / "here" / "try" / "results.json").read_bytes())
    with pytest.raises(RecipeError, match=r"holds results.json without the config.yaml"):
        run_arms(recipe(tmp_path / "there", seeds=[0, 1, 2, 3]), fake([], worth))
    (there / "config.yaml").write_bytes((tmp_path / "here" / "try" / "config.yaml").read_bytes())
    commands: list[list[str]] = []
    assert run_arms(recipe(tmp_path / "there", seeds=[0, 1, 2, 3]), fake(commands, worth)) == whole
    assert sum(command[0] == "pretrain" for command in commands) == 4


def test_the_published_table_matches_its_results(monkeypatch):
    """The published results are a start for the shipped recipe too; the table is theirs, and that of three seeds of which only means
    and intervals are left."""
    root = Path(__file__).parents[3]
    monkeypatch.chdir(root)
    shipped = read_stage("ablate", ["--config", "ablate/codis.yaml"])
    check_records(Path("docs/ablations"), shipped)
    found = read_results(Path("docs/ablations/results.json"), shipped)
    lost = json.loads(Path("docs/ablations/seeds_0_to_2.json").read_text())["conditions"]
    rows = [[cell.strip() for cell in line.split("|")] for line in Path("docs/ablations.md").read_text().splitlines()]
    rows = rows[next(number for number, row in enumerate(rows) if "MRR, 20 % wrong" in row) + 2 :]
    for comparison in shipped.comparisons.values():
        for arm in (comparison.baseline, *comparison.arms):
            first, *rows = rows
            assert first[1].endswith(f"`{arm}`") and first[-2] == comparison.arms.get(arm, "")
            for condition, (mean, minus) in zip(
                ("clean", "wrong20", "wrong40"), (first[2:4], first[4:6], first[6:8]), strict=True
            ):
                measured, before = values_of(found[condition], arm, "MRR"), lost.get(condition)
                apart = differences(found[condition], arm, comparison.baseline, "MRR")
                if before:
                    measured += 3 * [before["MRR"][arm]]
                    apart += three_of(*before["differences"].get(f"{arm} minus {comparison.baseline}", (0, 0, 0)))
                assert len(measured) == len(shipped.seeds) and mean == f"{sum(measured) / len(measured):.3f}"
                middle, low, high = paired(apart)
                bold = "**" if verdict(low, high) == "resolved" else ""
                assert minus == (
                    f"{bold}{middle:+.3f} [{low:+.3f}, {high:+.3f}]{bold}" if arm != comparison.baseline else ""
                )


def three_of(mean: float, low: float, high: float) -> list[float]:
    """Three numbers of that mean and 95 % t interval, which pool with others as any three such do."""
    deviation = (high - low) / 2 * math.sqrt(3) / float(stats.t.ppf(0.975, 2))
    return [mean - deviation, mean, mean + deviation]


def test_earlier_runs_of_a_process_do_not_change_a_run(drawn, tmp_path, capfd):
    """Two arms of the same recipe, one after another in one process: they differ in nothing."""
    (tmp_path / "base.yaml").write_text(
        json.dumps(
            {
                "name": "base",
                "data": {"train": str(drawn / "train"), "vocabulary": 400, "workers": 0},
                "model": {
                    "image": {"image_size": 32, "patch": 8, "width": 48, "depth": 2, "heads": 4},
                    "text": {"width": 48, "layers": 1, "heads": 4, "feed_forward": 96, "positions": 48},
                    "fusion": {"layers": 1},
                    "feature_dim": 32,
                    "codewords": 16,
                },
                "teacher": {"queue": 64},
                "optimizer": {"lr": 1.0e-3, "min_lr": 1.0e-5, "warmup_steps": 2},
                "training": {"global_batch": 16, "micro_batch": 16, "steps": 4, "precision": "fp32", "device": "cpu"},
            }
        )
    )
    settings = {"base": str(tmp_path / "base.yaml"), "arms": {"a": {}, "b": {}}, "seeds": [0, 1], "runs": str(tmp_path)}
    same = AblateRecipe(name="same", data=str(drawn / "test"), comparisons=expected(), **settings)
    with Workers(same.jobs, main) as start:
        run_arms(same, start)
    found = json.loads((tmp_path / "same" / "results.json").read_text())[""]
    assert found["a"] == found["b"] and found["a"]["0"]["MRR"] != found["a"]["1"]["MRR"]
    weights = [
        next((tmp_path / "same" / arm).glob("checkpoints/step-*/model.safetensors")) for arm in ("a-seed0", "b-seed0")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_command_that_fails_in_a_worker_stops_the_ablation_with_its_code(tmp_path):
    with (
        Workers(1, main) as start,
        pytest.raises(LigatureError, match="stopped in `ligature pretrain --config nothing.yaml`") as caught,
    ):
        start("pretrain", "--config", "nothing.yaml")
    assert caught.value.exit_code == 2
