"""VLDeformer: the parts are the joint model that sees one modality, the loss is the paper's, and a checkpoint goes round."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import small
import tiny_images
import torch
import vldeformer_jobs
from torch.nn.functional import cosine_similarity, normalize

from data_tools.in_order.collection import open_collection
from finetune.config import FinetuneRecipe
from finetune.encoders import load_encoder
from finetune.export.export import export
from finetune.heads.config import HardNegativesConfig, VLDeformerConfig
from finetune.heads.decomposed import LoadedVLDeformer
from finetune.heads.vldeformer import Altered, VLDeformerTask, contrastive_loss, cosine_loss
from finetune.train import retrieval_batch
from launch.cli import main
from pretrain.model import bert_layers
from pretrain.weights.load import load_model
from retrieval.index import Index
from retrieval.records import read_record
from runtime.errors import CheckpointError, RecipeError


def inputs(count=5):
    pictures = tiny_images.Pictures(count, 1)
    ids, mask = tiny_images.tokenizer()(pictures.captions)
    assert mask.sum(1).unique().numel() > 2
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return pixels, ids, mask


@pytest.mark.parametrize("text_layers", [0, 1])
def test_decomposed_is_the_joint_model_under_a_block_diagonal_mask(monkeypatch, text_layers):
    model = vldeformer_jobs.network("single_stream", text_layers=text_layers)
    pixels, ids, mask = inputs()
    fusion, words = model.fusion_encoder, ids.shape[1]
    joined, both = fusion.join(
        model.text_encoder(ids, mask), mask, fusion.prepare_images(model.image_encoder(pixels)), None
    )
    place = torch.arange(joined.shape[1]) < words
    block = place[:, None] == place[None]
    plain = bert_layers.attend
    with monkeypatch.context() as patch:
        patch.setattr(bert_layers, "attend", lambda q, k, v, allowed, drop: plain(q, k, v, allowed & block, drop))
        expected = fusion.run_layers(joined, both)
    parts = vldeformer_jobs.decomposed("single_stream", text_layers=text_layers)
    text, image = parts.text_states(ids, mask), parts.image_states(pixels)
    assert (text - expected[:, :words]).abs()[mask].max() < 1e-6
    assert (image - expected[:, words:]).abs().max() < 1e-6
    assert (text - fusion.run_layers(joined, both)[:, :words]).abs()[mask].max() > 1e-2, "together they see each other"


def test_decomposed_cross_attention_layers_run_all_but_cross_attention():
    """The layers without cross-attention, written out; the same weights on both sides."""
    model, parts = vldeformer_jobs.network("cross_attention"), vldeformer_jobs.decomposed("cross_attention")
    pixels, ids, mask = inputs()
    states, tokens = model.text_encoder(ids, mask), model.image_encoder(pixels)
    whole = torch.ones(tokens.shape[:2], dtype=torch.bool)
    for layer in model.fusion_encoder.layers:
        actual = []
        for side, seen in ((states, mask), (tokens, whole)):
            attended = layer.self_attention(side, seen)
            widened = torch.nn.functional.gelu(layer.intermediate(attended))
            actual.append(layer.norm(attended + layer.output(widened)))
        states, tokens = actual
    torch.testing.assert_close(parts.text_states(ids, mask)[mask], states[mask])
    torch.testing.assert_close(parts.image_states(pixels), tokens)
    assert not any("cross_attention" in name for name, _ in parts.named_parameters())
    assert "adaptation" in parts.name
    other = vldeformer_jobs.decomposed("cross_attention", image_width=48)
    assert other.encode_image(pixels).shape == other.encode_text(ids, mask).shape == (5, 32)


@pytest.mark.parametrize("kind", ["single_stream", "cross_attention"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_never_counts(kind, pooling):
    parts = vldeformer_jobs.decomposed(kind, pooling)
    _, ids, mask = inputs()
    actual = parts.encode_text(ids, mask)
    wider, longer = torch.nn.functional.pad(ids, (0, 3), value=9), torch.nn.functional.pad(mask, (0, 3))
    rubbish = torch.where(longer, wider, 11)
    torch.testing.assert_close(parts.encode_text(rubbish, longer), actual, atol=1e-9, rtol=1e-9)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = parts.encode_text(ids[row, None, :length], mask[row, None, :length])
        torch.testing.assert_close(alone[0], actual[row], atol=1e-9, rtol=1e-9)


def test_an_embedding_is_the_tanh_of_the_mean_token_and_compares_by_cosine():
    parts = vldeformer_jobs.decomposed("single_stream")
    pixels, ids, mask = inputs()
    states = parts.text_states(ids, mask)
    text = torch.stack([torch.tanh(row[own].mean(0)) for row, own in zip(states, mask, strict=True)])
    image = torch.tanh(parts.image_states(pixels).mean(1))
    expected = cosine_similarity(text[:, None], image[None], dim=-1)
    torch.testing.assert_close(parts.encode_text(ids, mask) @ parts.encode_image(pixels).T, expected)
    parts.pooling = "cls"
    torch.testing.assert_close(parts.encode_text(ids, mask), normalize(torch.tanh(states[:, 0]), dim=-1))


def by_hand(image, text, altered_image, altered_text, usable_image, usable_text, same, tau, shown=None):
    """Eq. 1-3 for one batch, in plain Python. shown[i][j]: altered image j shows patches of caption i's image."""

    def cos(one, other):
        dot = sum(a * b for a, b in zip(one, other, strict=True))
        return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))

    total, count = 0.0, len(image)
    for anchors, matched, altered, usable, left_out in (
        (text, image, altered_image, usable_image, shown),
        (image, text, altered_text, usable_text, None),
    ):
        for i in range(count):
            below = 0.0
            for j in range(count):
                if i == j or not same[i][j]:
                    below += math.exp(cos(anchors[i], matched[j]) / tau)
                if altered is not None and usable[j] and not (left_out and left_out[i][j]):
                    below += math.exp(cos(anchors[i], altered[j]) / tau)
            total -= math.log(math.exp(cos(anchors[i], matched[i]) / tau) / below) / count
    return total


@pytest.mark.parametrize(
    ("ids", "usable_image", "usable_text", "hard"),
    [
        ([1, 2, 3], [True] * 3, [True] * 3, True),
        ([1, 2, 3], None, None, False),
        ([1, 2, 3], [True, False, True], [False, True, True], True),
        ([7, 2, 7], [True] * 3, [False] * 3, True),
    ],
    ids=["six terms", "no hard negatives", "some could not be altered", "an image twice"],
)
def test_the_loss_is_the_papers_by_hand_for_three_pairs(ids, usable_image, usable_text, hard):
    generator = torch.Generator().manual_seed(5)
    sides = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    same = [[one == other for other in ids] for one in ids]
    lists = [side.tolist() for side in sides]
    expected = by_hand(*lists[:2], *(lists[2:] if hard else (None, None)), usable_image, usable_text, same, 0.05)
    unit = [normalize(side, dim=-1) for side in sides]
    more = (unit[2], unit[3], torch.tensor(usable_image), torch.tensor(usable_text)) if hard else ()
    actual = contrastive_loss(unit[0], unit[1], torch.tensor(ids), 0.05, Altered(*more))
    assert actual.item() == pytest.approx(expected, rel=1e-10)
    if hard:
        donors = [ids[1], ids[2], ids[0]]
        shown = [[one == donor for donor in donors] for one in ids]
        expected = by_hand(*lists, usable_image, usable_text, same, 0.05, shown)
        actual = contrastive_loss(unit[0], unit[1], torch.tensor(ids), 0.05, Altered(*more, torch.tensor(donors)))
        assert actual.item() == pytest.approx(expected, rel=1e-10)


def test_pairwise_cosine_draws_pairs_together_and_others_apart():
    generator = torch.Generator().manual_seed(6)
    image, text = (normalize(torch.randn(3, 4, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    cosine = (text @ image.T).tolist()
    pairs = sum(1 - cosine[i][i] for i in range(3)) / 3
    others = [max(0.0, cosine[i][j]) for i in range(3) for j in range(3) if (i, j) not in ((0, 2), (2, 0)) and i != j]
    actual = cosine_loss(image, text, torch.tensor([4, 1, 4]))
    assert actual.item() == pytest.approx(pairs + sum(others) / 4, rel=1e-12)


@pytest.mark.parametrize("kind", ["contrastive", "cosine"])
def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(gloo_pool, kind):
    torch.manual_seed(0)
    sides = [torch.randn(6, 8, dtype=torch.float64) for _ in range(4)]
    ids, usable = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([True, False, True, True, False, True])
    loss, gradients = vldeformer_jobs.loss_and_gradients(kind, sides, ids, usable)
    parts = gloo_pool.run(vldeformer_jobs.on_this_rank, kind, sides, ids, usable)
    assert sum(part[0] for part in parts).item() / 2 == pytest.approx(loss.item(), rel=1e-12)
    for number, expected in enumerate(gradients):
        torch.testing.assert_close(torch.cat([part[1][number] for part in parts]) / 2, expected)


NEGATIVES = ["--head", "vldeformer", "--vldeformer.negatives.lexicon", "built-in"]


@pytest.fixture(scope="module")
def run(single, drawn, tmp_path_factory):
    """A VLDeformer of it, four steps of two and two: stopped and gone on with."""
    runs = tmp_path_factory.mktemp("vldeformer")
    assert main(small.finetune(single, drawn, runs, *NEGATIVES, steps=4)) == 0
    return runs / "finetune"


def test_a_vldeformer_is_trained_saved_scored_and_loaded(single, run, drawn, tmp_path, capfd):
    assert main(small.evaluate(run, drawn, tmp_path / "tuned.json", "--save_scores", "true")) == 0
    assert main(small.evaluate(single, drawn, tmp_path / "before.json", "--heads", "[vldeformer, dual, fusion]")) == 0
    tuned, before = read_record(tmp_path / "tuned.json"), read_record(tmp_path / "before.json")
    assert (tuned["head"], tuned["training"]) == ("vldeformer", "fine-tuned-on shapes")
    assert (before["head"], before["training"]) == ("vldeformer, not tuned", "pretrained")
    assert {read_record(tmp_path / f"before-{head}.json")["head"][:4] for head in ("dual", "fusion")} == {
        "dual",
        "fusi",
    }
    loaded = LoadedVLDeformer(run)
    collection = open_collection(drawn / "test", None)
    pictures = [collection[number] for number in range(3)]
    scores = np.load(tmp_path / "tuned.scores.npz")["scores"]
    actual = loaded.encode_image(pictures) @ loaded.encode_text(collection.captions[:7]).T
    np.testing.assert_allclose(actual.numpy(), scores[:3, :7], atol=1e-5)
    assert actual.abs().max() < 1 and loaded.hash == tuned["checkpoint"]


def back_to_step_2(run):
    (run / "finished.json").unlink()
    for name in ("latest", "best"):
        (run / "checkpoints" / name).write_text("step-00000002")
    shutil.rmtree(run / "checkpoints" / "step-00000004")


def test_a_run_does_not_resume_beside_another_joint_model(single, drawn, tmp_path, capfd):
    """The model it began from stays beside it and says where nouns are in a picture."""
    source = tmp_path / "source"
    shutil.copytree(single, source)
    command = small.finetune(source, drawn, tmp_path, *NEGATIVES, steps=4)
    assert main(command) == 0
    back_to_step_2(tmp_path / "finetune")
    (tmp_path / "other").mkdir()
    other = small.pretrain(tmp_path / "other", drawn, *small.SINGLE, "--training.seed", "5")
    shutil.rmtree(source)
    shutil.copytree(other, source)
    capfd.readouterr()
    assert main(command) == 1
    assert "source is not the checkpoint that this run started from" in capfd.readouterr().err


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(single, run, drawn, tmp_path, capfd):
    """Altered words and patches are a function of the sample, so nothing of them is lost."""
    assert main(small.finetune(single, drawn, tmp_path, *NEGATIVES, steps=4)) == 0
    ours, theirs = (LoadedVLDeformer(folder).model.state_dict() for folder in (tmp_path / "finetune", run))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    back_to_step_2(tmp_path / "finetune")
    assert main(small.finetune(single, drawn, tmp_path, *NEGATIVES, steps=4)) == 0
    assert "at step 2" in capfd.readouterr().out
    again = LoadedVLDeformer(tmp_path / "finetune" / "checkpoints" / "step-00000004").model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in again.items())


def test_shortlists_are_re_ranked_by_the_original_fusion_model(single, run, drawn, tmp_path, capfd):
    lists = ["--heads", "[fusion]", "--shortlist_from", str(run), "--shortlist"]
    for name, size in (("all", "500"), ("few", "4")):
        assert main(small.evaluate(single, drawn, tmp_path / f"{name}.json", *lists, size)) == 0
    assert main(small.evaluate(single, drawn, tmp_path / "own.json", "--heads", "[fusion]", "--shortlist", "500")) == 0
    assert main(small.evaluate(run, drawn, tmp_path / "first.json")) == 0
    every, few, own, first = (read_record(tmp_path / f"{name}.json") for name in ("all", "few", "own", "first"))
    assert every["text_to_image"] == own["text_to_image"], "a list of everything does not say who made it"
    assert few["shortlist"]["checkpoint"] == first["checkpoint"] and few["shortlist"]["head"] == "vldeformer"
    assert few["shortlist"]["recall"]["text_to_image"] == pytest.approx(first["text_to_image"]["R@5"], abs=12)
    capfd.readouterr()
    assert main(small.evaluate(single, drawn, tmp_path / "x.json", "--shortlist_from", str(run))) == 2
    assert "add fusion to heads" in capfd.readouterr().err


def test_a_vldeformer_is_indexed_and_searched_like_a_dual_head(run, drawn, tmp_path, capsys):
    where = ["--data", str(drawn / "test"), "--out", str(tmp_path / "index"), "--workers", "0", "--device", "cpu"]
    assert main(["index", "--checkpoint", str(run), *where]) == 0
    encoder, index = load_encoder(run), Index(tmp_path / "index")
    collection = open_collection(drawn / "test", None)
    expected = encoder.encode_image(torch.stack([encoder.transform(collection[number]) for number in range(24)]))
    np.testing.assert_allclose(np.asarray(index.vectors[:24]), expected.numpy(), atol=1e-5)
    assert main(["search", "--index", str(tmp_path / "index"), "a red circle", "--top", "3"]) == 0
    assert "a red circle" in capsys.readouterr().out


def test_a_single_stream_model_is_exported_and_loaded_like_any_other(single, tmp_path):
    assert main(["export", str(single), str(tmp_path / "out")]) == 0
    ours, theirs = load_model(tmp_path / "out"), load_model(single)
    assert ours.network.config.fusion.kind == "single_stream"
    words, pixels = ["a red circle"], torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert torch.equal(ours.match(pixels, words), theirs.match(pixels, words))


def task_of(checkpoint, **settings):
    negatives = settings.pop("negatives", {"lexicon": "built-in"})
    config = VLDeformerConfig(negatives=HardNegativesConfig(**negatives), **settings)
    return VLDeformerTask(FinetuneRecipe(head="vldeformer", checkpoint=str(checkpoint), dataset="x", vldeformer=config))


def a_batch(task, size=4):
    generator = torch.Generator().manual_seed(1)
    ids, mask = task.tokenizer(["a large red circle", "two small stars above a ring", "the", "a blue square"][:size])
    return {
        "images": torch.randint(0, 256, (1, size, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "ids": ids,
        "mask": mask,
        "image_ids": torch.arange(size),
        "positions": torch.arange(size) + 40,
    }


def test_a_cross_attention_checkpoint_is_decomposed_and_labelled_an_adaptation(pretrained, drawn, tmp_path):
    assert main(small.finetune(pretrained, drawn, tmp_path, *NEGATIVES, steps=1)) == 0
    assert main(small.evaluate(tmp_path / "finetune", drawn, tmp_path / "scores.json")) == 0
    assert read_record(tmp_path / "scores.json")["head"] == "vldeformer of cross-attention layers (an adaptation)"
    task = task_of(pretrained)
    task(retrieval_batch(a_batch(task), 0, torch.device("cpu")))[0].backward()
    assert all(parameter.grad is not None for parameter in task.model.parameters())
    assert task.guide.fusion_encoder.layers[0].cross_attention is not None, "what shows where nouns look stays whole"


def test_patches_of_nouns_do_not_depend_on_fresh_joint_layers(single):
    tuned, fresh = task_of(single), task_of(single, start="fresh_joint")
    torch.testing.assert_close(dict(tuned.guide.state_dict()), dict(fresh.guide.state_dict()), rtol=0, atol=0)
    old, new = ([*task.model.joint.parameters()] for task in (tuned, fresh))
    assert not all(torch.equal(*both) for both in zip(old, new, strict=True))


def test_every_weight_learns_and_unaltered_samples_are_counted(single):
    task = task_of(single)
    loss, figures = task(retrieval_batch(a_batch(task), 0, torch.device("cpu")))
    loss.backward()
    learned = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    idle = {name for name, parameter in task.model.named_parameters() if parameter.grad is None}
    assert not idle and all(name.startswith("model.") for name in learned)
    assert all(parameter.grad is None for parameter in task.guide.parameters())
    assert float(figures["unaltered_captions"]) == 0.25, "the caption `the` has no word to exchange"
    assert {"fooled_by_altered_text", "fooled_by_altered_image", "contrastive"} <= figures.keys()


def test_each_switch_turns_off_its_own_part(single):
    whole = task_of(single)
    batch = retrieval_batch(a_batch(whole), 0, torch.device("cpu"))
    plain = task_of(single, negatives={"text": False, "image": False}).eval()
    loss, figures = plain(batch)
    assert set(figures) == {"loss", "contrastive"} and plain.guide is None
    image, text = plain.model.encode_image(batch.images), plain.model.encode_text(batch.text.ids, batch.text.mask)
    torch.testing.assert_close(loss, contrastive_loss(image, text, batch.image_ids, 0.005))
    softer, _ = task_of(single, negatives={"text": False, "image": False}, temperature=0.05).eval()(batch)
    torch.testing.assert_close(softer, contrastive_loss(image, text, batch.image_ids, 0.05))
    texts_alone = task_of(single, negatives={"image": False, "lexicon": "built-in"}).eval()
    assert set(texts_alone(batch)[1]) == {"loss", "contrastive", "unaltered_captions", "fooled_by_altered_text"}
    assert texts_alone(batch)[0].item() > loss.item(), "more terms in the denominators"
    assert set(task_of(single, loss="cosine")(batch)[1]) == {"loss", "cosine"}


def test_without_pretraining_sizes_stay_and_weights_are_fresh(single):
    started, fresh = task_of(single), task_of(single, start="unpretrained")
    mine, theirs = started.model.state_dict(), fresh.model.state_dict()
    assert {name: weight.shape for name, weight in mine.items()} == {name: w.shape for name, w in theirs.items()}
    source = load_model(single).network.state_dict()
    name = "text_encoder.words.weight"
    assert torch.equal(mine[name], source[name]) and not torch.equal(theirs[name], source[name])
    joint = task_of(single, start="fresh_joint").model.state_dict()
    changed = {key for key, weight in joint.items() if not torch.equal(weight, mine[key])}
    assert changed and all(key.startswith("joint.") for key in changed)
    again = task_of(single, start="unpretrained").model.state_dict()
    assert all(torch.equal(weight, again[key]) for key, weight in theirs.items()), "the seed decides"


def test_pretraining_that_began_from_a_model_has_no_unpretrained_start(single, drawn, tmp_path):
    further = small.pretrain(tmp_path, drawn, *small.SINGLE, "--checkpoint", str(single))
    with pytest.raises(RecipeError, match=f"began from {single}, not from nothing"):
        task_of(further, start="unpretrained")


def test_an_export_has_no_unpretrained_start(single, tmp_path):
    export(single, tmp_path / "plain")
    with pytest.raises(RecipeError, match="does not say what pretraining began from; give the run's own checkpoint"):
        task_of(tmp_path / "plain", start="unpretrained")


def test_a_batch_of_one_has_no_image_to_take_patches_from(single):
    task = task_of(single)
    loss, _ = task(retrieval_batch(a_batch(task, 1), 0, torch.device("cpu")))
    assert loss.isfinite()


def test_unsuitable_checkpoints_are_refused_in_one_line(single, run, pretrained, drawn, tmp_path, capfd):
    assert main(small.finetune(run, drawn, tmp_path / "a", *NEGATIVES)) == 1
    assert "holds a vldeformer head, not an alignment model" in capfd.readouterr().err
    assert main(small.evaluate(run, drawn, tmp_path / "x.json", "--heads", "[dual]")) == 2
    assert "is a VLDeformer checkpoint" in capfd.readouterr().err
    (tmp_path / "small.yaml").write_text(small.RECIPE)
    bare = [
        "--model.fusion.layers",
        "0",
        "--objectives.matching.weight",
        "0",
        "--objectives.masked_language.weight",
        "0",
    ]
    recipe = ["--config", str(tmp_path / "small.yaml"), "--runs", str(tmp_path), "--data.train", str(drawn / "train")]
    assert main(["pretrain", *recipe, *bare]) == 0
    capfd.readouterr()
    for command in (
        small.finetune(tmp_path / "pretrain", drawn, tmp_path / "b", *NEGATIVES),
        small.evaluate(tmp_path / "pretrain", drawn, tmp_path / "y.json", "--heads", "[vldeformer]"),
    ):
        assert main(command) == 1
        assert "no fusion encoder, so there is nothing to decompose" in capfd.readouterr().err
    assert not (tmp_path / "b").exists() and not (tmp_path / "x.json").exists() and not (tmp_path / "y.json").exists()
    with pytest.raises(RecipeError, match="temperature is 0"):
        VLDeformerConfig(temperature=0)
    with pytest.raises(CheckpointError, match="holds a vldeformer head"):
        load_model(run)


def test_a_model_without_text_layers_is_scored_by_fusion_of_all_pairs_and_taken_apart(drawn, tmp_path, capfd):
    (tmp_path / "small.yaml").write_text(small.RECIPE)
    recipe = ["--config", str(tmp_path / "small.yaml"), "--runs", str(tmp_path), "--data.train", str(drawn / "train")]
    off = ["--objectives.contrastive.weight", "0", "--objectives.codebook.weight", "0", "--model.codewords", "0"]
    assert main(["pretrain", *recipe, *small.SINGLE, "--model.text.layers", "0", *off]) == 0
    checkpoint = tmp_path / "pretrain"
    assert main(small.evaluate(checkpoint, drawn, tmp_path / "fusion.json", "--heads", "[fusion]")) == 0
    record = read_record(tmp_path / "fusion.json")
    assert record["head"] == "fusion of all pairs" and record["shortlist"]["recall"]["image_to_text"] == 100
    capfd.readouterr()
    assert main(small.evaluate(checkpoint, drawn, tmp_path / "dual.json")) == 2
    assert "no text layers, so no dual head" in capfd.readouterr().err
    assert main(small.finetune(checkpoint, drawn, tmp_path / "dual")) == 1
    assert "--head vldeformer" in capfd.readouterr().err
    assert main(small.finetune(checkpoint, drawn, tmp_path / "apart", *NEGATIVES, steps=1)) == 0
