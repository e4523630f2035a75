"""In the vldeformer_scenes campaign a model that ignores the picture gets half of the questions right."""

from __future__ import annotations

import torch

from benchmarks.campaigns import vldeformer_scenes as campaign
from data_tools.shapes.scenes import SHAPES, scenes
from finetune.heads.decomposed import LoadedVLDeformer
from runtime.figures import pyplot


class BagOfWords:
    """Scores a caption by its words in any order, whatever the picture."""

    class model:  # noqa: N801 (stands where a model does)
        @staticmethod
        def transform(picture):
            return torch.zeros(3, 4, 4)

    def encode_image(self, images):
        return images.flatten(1)

    def score(self, features, captions):
        return torch.tensor([[float(sum(map(hash, caption.split())) % 1000) for caption in captions]] * len(features))


def test_a_bag_of_words_gets_half_of_the_relations_right():
    assert campaign.relation_accuracy(BagOfWords(), 20, 32) == 50


def test_a_choice_offers_one_absent_untrained_shape():
    choices = campaign.make_choices(60)
    drawn = scenes("test", 240, world=campaign.WORLD)
    assert len(choices) == 60
    for number, true, altered in choices:
        (index,) = (i for i, (a, b) in enumerate(zip(true.split(), altered.split(), strict=True)) if a != b)
        old, new = (campaign.shape_name(caption.split()[index]) for caption in (true, altered))
        assert {old, new} == set(campaign.HELD_OUT) and not {old, new} & set(campaign.TRAINED)
        shapes = [group.shape for group in drawn[number].groups]
        assert old in shapes and new not in shapes
        assert true.split()[index].endswith("s") in (
            altered.split()[index].endswith("s"),
            old == "cross",
            new == "cross",
        )


def test_a_rule_over_words_gets_half_of_the_choices_right():
    choices = campaign.make_choices(300)
    assert len(choices) == 300
    for liked in SHAPES:
        rule = torch.tensor([[float(liked in one), float(liked in other)] for _, one, other in choices])
        assert campaign.share_right(rule) == 50


def test_a_tie_counts_half():
    assert campaign.share_right(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [3.0, 1.0]])) == 62.5


def test_the_arms_measure_what_the_model_scores(single, drawn):
    """Fusion's scorer against `match`, the untuned model's against its own embeddings."""
    from pretrain.weights.load import load_model

    model = load_model(single)
    matched, embedded = campaign.Matched(model), campaign.Embedded(LoadedVLDeformer(single))
    pictures = [campaign.draw(scene, 32) for scene in scenes("test", 3, world=campaign.WORLD)]
    words = ["a red circle", "two blue stars"]
    with torch.no_grad():
        scores = matched.score(campaign.encode_pictures(matched, pictures), words)
        for row, picture in enumerate(pictures):
            expected = model.match([picture, picture], words)
            torch.testing.assert_close(torch.sigmoid(scores[row]), expected, atol=1e-5, rtol=1e-4)
        expected = embedded.encoder.encode_image(pictures) @ embedded.encoder.encode_text(words).T
        torch.testing.assert_close(embedded.score(campaign.encode_pictures(embedded, pictures), words), expected)


def test_a_small_campaign_runs_from_drawing_to_plot_and_keeps_its_results(tmp_path, capfd):
    small = ["--seeds", "2", "--scenes", "300", "--pretrain_steps", "2", "--joint_steps", "2", "--steps", "2"]
    small += ["--pairs", "12", "--gallery", "20", "--out", str(tmp_path / "campaign")]
    arguments = [*small, "--arms", "dual", "fusion", "untuned", "vldeformer", "hard"]
    assert campaign.main(arguments) == 0
    table = capfd.readouterr().out.split("\n2 seeds, 12 pairs")[1]
    assert all(f"\n{arm}" in table for arm in ("dual", "fusion", "untuned", "vldeformer", "hard"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "campaign").glob("*/checkpoints/step-*")}
    assert len(times) == 8 and (tmp_path / "campaign" / "accuracy_latency.png").stat().st_size > 10_000
    assert "fusion of all pairs right, vldeformer" in (tmp_path / "campaign" / "flips.html").read_text()
    (tmp_path / "campaign" / "dual-0.json").unlink()
    assert campaign.main(arguments) == 0, "results that exist are kept"
    assert table.splitlines()[2:6] == capfd.readouterr().out.split("\n2 seeds, 12 pairs")[1].splitlines()[2:6]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_every_mark_of_the_plot_stands_at_its_value(monkeypatch, tmp_path):
    """Two arms of equal speed are told apart by their rows; nothing is moved to make room."""
    drawn = []
    monkeypatch.setattr(campaign, "save_figure", lambda figure, out, dpi: drawn.append(figure))
    figures = {
        "slow": [{"relation": 90.0, "milliseconds": 120.0}, {"relation": 94.0, "milliseconds": 122.0}],
        "quick": [{"relation": 60.0, "milliseconds": 1.76}, {"relation": 70.0, "milliseconds": 1.76}],
        "twin": [{"relation": 50.0, "milliseconds": 1.76}, {"relation": 52.0, "milliseconds": 1.76}],
    }
    campaign.plot(figures, 500, tmp_path / "plot.png")
    accuracy, speed = drawn[0].axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["quick", "twin", "slow"]
    assert [tuple(line.get_xydata()[0]) for line in speed.lines] == [(1.76, 0), (1.76, 1), (121.0, 2)]
    seeds = [tuple(map(tuple, dots.get_offsets())) for dots in accuracy.collections if len(dots.get_offsets()) == 2]
    assert seeds == [((60, 0), (70, 0)), ((50, 1), (52, 1)), ((90, 2), (94, 2))]
    pyplot().close(drawn[0])
