"""The page of a run, and the page that compares runs: files that fetch nothing, and what they say is right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from data_tools.in_order.collection import Collection
from finetune.report import model_sections, word_map_figures
from finetune.report.codewords import find_most_used
from finetune.report.comparison_page import name_runs
from finetune.report.curve_panels import run_curves_html
from finetune.report.word_map_figures import colours_of, overlay_heat
from launch.cli import main
from runtime.errors import RecipeError


@pytest.fixture
def copied(reported, tmp_path) -> Path:
    """A copy of the run to change."""
    return Path(shutil.copytree(reported, tmp_path / "copied"))


def report(run: Path, *more: str) -> str:
    """Write the page of a run and return it."""
    assert main(["report", str(run), "--out", str(run / "page.html"), *more]) == 0
    return (run / "page.html").read_text()


def test_the_page_holds_everything_and_fetches_nothing(reported, capsys):
    assert main(["report", str(reported)]) == 0
    text = (reported / "report.html").read_text()
    for title in (
        "Parts of the loss",
        "Temperature",
        "Teacher and student",
        "perplexity",
        "Dead codewords",
        "errors of the marginals",
    ):
        assert title in text, title
    headings = (
        "Losses and scores",
        "Throughput",
        "Recipe",
        "Codebook",
        "Most used codewords",
        "Where the fusion encoder looks",
    )
    for heading in headings:
        assert f"<h2>{heading}" in text
    sources = re.findall(r"(?:src|href)=['\"]([^'\"]+)", text)
    assert len(sources) > 30 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in text and "match 0." in text
    logged = [
        json.loads(line) for line in (reported / "metrics.jsonl").read_text().splitlines() if "train/loss" in line
    ]
    for name in ("teacher_distance", "codebook/churn", "codebook/largest_share", "codebook/dead", "temperature"):
        assert f"train/{name}" in logged[-1], name
    assert logged[-1]["train/teacher_distance"] > 0
    values = " ".join(f"{line['train/loss']:.5g}" for line in logged)
    assert f"data-steps='1 2 3 4 5' data-values='{values}'" in text, "the loss can be read off at each step"


def test_figures_that_no_panel_names_are_shown_where_they_are_used():
    lines = [{"step": step, "train/mine": step, "train/codebook/new": 1.0, "train/quarantined": 0.0} for step in (1, 2)]
    text = "".join(run_curves_html([*lines, {"step": 2, "validation/codebook_cone": 0.5}], {}))
    headings = [(title, text.index(f"<h2>{title}")) for title in ("Codebook figures", "Other figures")]
    assert headings[0][1] < text.index("<span>new</span>") < headings[1][1] < text.index("<span>mine</span>")
    assert "<span>validation: codebook cone</span>" in text and "quarantined" not in text


def test_the_recipe_shows_what_differs_from_the_one_it_was_started_from(copied):
    environment = json.loads((copied / "environment.json").read_text())
    command = ["ligature", "pretrain", "--config", "pretrain/demo.yaml", "--training.steps", "5"]
    (copied / "environment.json").write_text(json.dumps(environment | {"command": command}))
    text = report(copied, "--limit", "0")
    assert "Compared with pretrain/demo.yaml" in text
    assert "<tr><th>training.steps</th><td>900</td><td><mark>5</mark></td></tr>" in text
    assert "<tr><th>training.seed</th><td>0</td></tr>" in text, "unchanged keys are in the whole recipe alone, unmarked"
    (copied / "environment.json").write_text(json.dumps(environment | {"command": ["--config=/nowhere/mine.yaml"]}))
    assert "Compared with the defaults (/nowhere/mine.yaml cannot be read from here)" in report(copied, "--limit", "0")


def test_errors_and_skipped_steps_are_on_the_page(copied):
    sick = {"step": 3, "reason": "the gradient is not finite", "loss": 4.5, "gradient_norm": "inf", "in_a_row": 1}
    sick["ranks"] = [{"loss": 4.5, "keys": ["a<b>", "c", "d", "e", "f"]}]
    (copied / "sick_steps.jsonl").write_text(json.dumps(sick) + "\n" + '{"step": 4, "rea')
    failures = [{"shard": "0.tar", "key": str(key), "reason": "cut short"} for key in range(3)]
    (copied / "quarantine.jsonl").write_text("".join(json.dumps(failure) + "\n" for failure in failures))
    (copied / "logs").mkdir()
    (copied / "logs" / "node0.log").write_text("=== start\nligature: the disk is full\n")
    text = report(copied, "--limit", "0")
    assert "Last error: ligature: the disk is full (node0.log)" in text
    assert "Skipped steps: 1." in text and "a&lt;b&gt;, c, d, e and 1 more" in text and "inf</td>" in text
    assert "<title>step 3: the gradient is not finite</title>" in text, "the curves mark it"
    assert "Samples that could not be read: 3" in text and "cut short" in text
    assert "<h2>Errors and events" not in report_of_healthy(copied)


def report_of_healthy(run: Path) -> str:
    """Remove what went wrong in a run, and return its page."""
    shutil.rmtree(run / "logs")
    for name in ("sick_steps.jsonl", "quarantine.jsonl"):
        (run / name).unlink()
    return report(run, "--limit", "0")


def test_only_the_first_images_are_read_and_encoded(reported, tmp_path, monkeypatch):
    read, encoded = [], []
    whole, encode = Collection.__getitem__, model_sections.load_model

    def load_and_count(run):
        model = encode(run)
        for name in ("encode_image", "encode_text"):
            function = getattr(model, name)
            monkeypatch.setattr(
                model, name, lambda batch, function=function: (encoded.append(len(batch)), function(batch))[1]
            )
        return model

    monkeypatch.setattr(Collection, "__getitem__", lambda self, number: (read.append(number), whole(self, number))[1])
    monkeypatch.setattr(model_sections, "load_model", load_and_count)
    assert main(["report", str(reported), "--limit", "8", "--out", str(tmp_path / "page.html")]) == 0
    assert sorted(read) == list(range(8)) and encoded == [8, 40]  # five captions an image
    assert "on 8 images and 40 captions" in (tmp_path / "page.html").read_text()


def test_without_data_the_page_says_so(copied):
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"validation: /.*", "validation: /nowhere", config))
    text = report(copied)
    assert "There is no data to look at" in text and "<h2>Codebook<" not in text


def test_before_the_first_checkpoint_there_are_curves(copied):
    shutil.rmtree(copied / "checkpoints")
    text = report(copied)
    assert "There is no checkpoint yet" in text and "<h2>Throughput" in text and "<h2>Codebook<" not in text


def tune(checkpoint, drawn, runs, steps, *more):
    """Fine-tune for a few steps; the run is `tuned`."""
    data = ["--data.train", str(drawn / "train"), "--data.validation", str(drawn / "validation")]
    start = ["--config", "finetune/demo.yaml", "--checkpoint", str(checkpoint), "--runs", str(runs), "--name", "tuned"]
    short = {"global_batch": "8", "steps": str(steps), "log_every": "1", "device": "cpu"}
    settings = [word for key, value in short.items() for word in (f"--training.{key}", value)]
    assert main(["finetune", *start, *data, *settings, *more]) == 0


def test_a_fine_tuned_run_has_its_own_page_and_an_unreadable_recipe_says_what_is_wrong(
    reported, drawn, tmp_path, capsys
):
    tune(reported, drawn, tmp_path, 2)
    text = report(tmp_path / "tuned", "--limit", "8")
    assert "fine-tuning of the dual head on shapes" in text and "<h2>Where the fusion encoder looks" in text
    assert "<h2>Codebook<" not in text and "data-steps='1 2'" in text
    config = tmp_path / "tuned" / "config.yaml"
    config.write_text("oldest: 1\n" + config.read_text())
    assert main(["report", str(tmp_path / "tuned")]) != 0
    assert "unknown key oldest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("head", "shown"),
    [
        (["hat", "--hat.levels", "[[1,1]]"], "text 1, image 1"),
        (["hat", "--hat.levels", "[[1,1]]", "--hat.attention", "mean"], "it has no attention to show"),
        (["vldeformer"], "A vldeformer head compares one vector"),
    ],
)
def test_each_head_has_its_word_maps_or_says_why_not(reported, drawn, tmp_path, head, shown):
    tune(reported, drawn, tmp_path, 1, "--head", *head)
    text = report(tmp_path / "tuned", "--limit", "8")
    assert shown in text and f"fine-tuning of the {head[0]} head" in text
    assert ("<h2>Where HAT's words look" in text) == (shown == "text 1, image 1")


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no run (no config.yaml)" in capsys.readouterr().err


def test_several_runs_are_compared(reported, copied, tmp_path):
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("weight_decay: ", "weight_decay: 1"))
    assert main(["report", str(reported), str(copied), "--out", str(tmp_path / "both.html")]) == 0
    text = (tmp_path / "both.html").read_text()
    assert "<h1>small and copied</h1>" in text and "1 of " in text
    assert re.search(r"<tr><th>optimizer.weight_decay</th><td>0.0\d</td><td><mark>10.0\d</mark></td></tr>", text)
    chart = text[text.index("<span>Loss</span>") :]
    chart = chart[: chart.index("</figure>")]
    assert chart.count("class='curve'") == 2 and "small <b>" in chart and "copied <b>" in chart


def test_runs_of_one_name_are_told_apart_by_their_folders():
    assert list(name_runs([Path("/a/one/run"), Path("/a/two/run")])) == ["one/run", "two/run"]
    with pytest.raises(RecipeError, match="named twice"):
        name_runs([Path("/a/run"), Path("/a/../a/run")])


def test_options_that_do_not_go_together_are_refused(reported, copied, capsys):
    for words, message in (
        ([str(reported), str(copied), "--data", "x"], "are for the page of one run"),
        ([str(reported), "--limit", "-1"], "--limit is -1"),
        ([str(reported), "--watch", "0"], "--watch is 0"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err


def test_watching_writes_the_page_again_until_the_run_is_finished(copied, monkeypatch, capsys):
    """The run ends while the command sleeps for the first time; the page of the finished run has the model's sections."""
    finished, pages = (copied / "finished.json").read_text(), []
    (copied / "finished.json").unlink()

    def sleep(seconds: float) -> None:
        assert seconds == 7
        pages.append((copied / "report.html").read_text())
        (copied / "finished.json").write_text(finished)

    monkeypatch.setattr("launch.commands.report.time.sleep", sleep)
    assert main(["report", str(copied), "--limit", "8", "--watch", "7"]) == 0
    assert len(pages) == 1 and "not finished" in pages[0] and "<h2>Codebook<" not in pages[0]
    assert "<h2>Codebook<" in (copied / "report.html").read_text()
    assert capsys.readouterr().out.count("report.html") == 2


def test_a_codeword_has_its_nearest_images_and_telling_words():
    similarity_ik = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.7, 0.0]])
    similarity_tk = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.1, 0.9, 0.0]])
    first, second = find_most_used(similarity_ik, similarity_tk, ["a red dog", "a red cat", "a blue dog", "a blue cat"])
    assert (first.number, first.images[:2], first.words[0]) == (0, [0, 1], "red")
    assert (second.number, second.images[0], second.words[0]) == (1, 2, "blue")
    assert first.share == pytest.approx(4 / 7)


def test_the_colours_of_word_maps_are_perceptually_uniform():
    """Equal steps of weight are about equal steps of lightness (CIE 1976), so no edge is seen where there is none."""
    linear = colours_of(torch.linspace(0, 1, 65)).double()
    linear = torch.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    luminance = linear @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    lightness = torch.where(luminance > 216 / 24389, 116 * luminance ** (1 / 3) - 16, luminance * 24389 / 27)
    steps = lightness.diff()
    assert lightness[-1] - lightness[0] > 90 and steps.min() > 0 and steps.max() < 2 * steps.mean()


def test_an_overlay_has_the_legends_colours_on_the_whole():
    share = word_map_figures.IMAGE_SHARE
    for brightness in (0, 100, 255):
        for weight in (0.0, 1.0):
            overlay = overlay_heat(torch.full((3, 16, 16), brightness, dtype=torch.uint8), torch.full((2, 2), weight))
            assert overlay.dtype == torch.uint8
            legend = share * word_map_figures.MID_GREY + (1 - share) * 255 * colours_of(torch.tensor([weight]))[0]
            torch.testing.assert_close(overlay.float(), legend.view(3, 1, 1).expand(3, 16, 16), atol=0.5, rtol=0)
