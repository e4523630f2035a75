"""The single-stream fusion encoder: its attention is joint, its objectives reach it, it trains under ZeRO 3, without text layers too."""

from __future__ import annotations

import engine_jobs
import pytest
import tiny
import torch

from pretrain.model import bert_layers
from pretrain.weights.load import ImageTextModel
from pretrain.word_maps import attention_maps, run_with_attention, word_maps
from runtime.errors import CheckpointError, RecipeError

KIND = {"model__fusion": {"kind": "single_stream", "layers": 2}}
WORDLESS = KIND | {
    "model__text__layers": 0,
    "model__codewords": 0,
    "objectives__contrastive__weight": 0.0,
    "objectives__codebook__weight": 0.0,
}


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.recipe(**KIND)).eval()


def fused(model, images, ids, mask, image_of_text=None):
    read = model.fusion_encoder.prepare_images(model.image_encoder(images))
    return model.fusion_encoder(model.text_encoder(ids, mask), mask, read, image_of_text)


def test_it_is_one_stack_of_plain_layers_over_words_and_then_patches(model, monkeypatch):
    batch = tiny.batch(3)
    fusion, mask = model.fusion_encoder, batch["mask"]
    assert all(layer.cross_attention is None for layer in fusion.layers)
    seen = []

    def spy(query, key, value, allowed, dropout):
        seen.append((query.shape[2], key.shape[2], allowed))
        return plain(query, key, value, allowed, dropout)

    plain = bert_layers.attend
    monkeypatch.setattr(bert_layers, "attend", spy)
    states = fused(model, batch["images"][0], batch["ids"], mask)
    together = tiny.CAPTION_WORDS + model.image_encoder.tokens
    assert states.shape == (3, tiny.CAPTION_WORDS, 32)
    assert [sizes for *sizes, _ in seen[-2:]] == [[together, together]] * 2, "every token looks at every token"
    for *_, allowed in seen[-2:]:
        assert torch.equal(allowed[:, 0, 0, : tiny.CAPTION_WORDS], mask) and allowed[..., tiny.CAPTION_WORDS :].all()


def test_padding_changes_nothing_and_images_are_chosen_by_row(model):
    batch = tiny.batch(5)
    images, ids, mask = batch["images"][0], batch["ids"], batch["mask"]
    states = fused(model, images, ids, mask)
    torch.testing.assert_close(fused(model, images, torch.where(mask, ids, 7), mask)[mask], states[mask])
    for row, length in enumerate(mask.sum(1).tolist()):
        one = slice(row, row + 1)
        alone = fused(model, images[one], ids[one, :length], mask[one, :length])
        torch.testing.assert_close(alone[0], states[row, :length], atol=1e-5, rtol=1e-5)
    chosen = torch.tensor([3, 3, 0, 4, 1])
    torch.testing.assert_close(fused(model, images, ids, mask, chosen), fused(model, images[chosen], ids, mask))


def test_words_read_patches_and_segments_tell_the_sides_apart(model):
    batch = tiny.batch(2)
    images, ids, mask = batch["images"][0], batch["ids"], batch["mask"]
    states = fused(model, images, ids, mask)
    assert (states - fused(model, images.flip(0), ids, mask)).abs()[mask].max() > 1e-2
    swapped = tiny.model(tiny.recipe(**KIND)).eval()
    swapped.fusion_encoder.segments.weight.data = model.fusion_encoder.segments.weight.data.flip(0)
    assert (states - fused(swapped, images, ids, mask)).abs()[mask].max() > 1e-3


def gradients(changes, size=8):
    task = tiny.task(tiny.recipe(**changes))
    (inputs,), _ = task.prepare(tiny.batch(size), 1.0, size)
    total, figures = task.student(inputs)
    total.backward()
    return {name for name, parameter in task.student.model.named_parameters() if parameter.grad is not None}, figures


@pytest.mark.parametrize("negatives", ["nearby", "all_ranks"])
def test_all_objectives_together_reach_every_weight(negatives):
    reached, figures = gradients(KIND | {"objectives__matching": {"negatives": negatives}})
    assert reached == {name for name, _ in tiny.model(tiny.recipe(**KIND)).named_parameters()}
    assert {"contrastive", "matching", "masked_language", "codebook"} <= figures.keys()


def test_without_text_layers_matching_and_masked_words_train_all_weights():
    reached, figures = gradients(WORDLESS)
    idle = ("image_projection", "text_projection", "temperature")
    names = {name for name, _ in tiny.model(tiny.recipe(**WORDLESS)).named_parameters()}
    assert names - reached == {name for name in names if name.startswith(idle)}
    assert {"matching", "masked_language"} <= figures.keys() and "contrastive" not in figures


def test_without_text_layers_wrong_pairs_are_drawn_alike():
    """There is nothing to draw the hard ones by: over many draws, each of the others comes up."""
    task = tiny.task(tiny.recipe(**WORDLESS, objectives__matching={"pool": 8}))
    (inputs,), _ = task.prepare(tiny.batch(8) | {"image_ids": torch.arange(8)}, 1.0, 8)
    matching = task.student.objectives["matching"]
    state = tiny.state(task.student.model, inputs)
    drawn = torch.cat(
        [matching.draw(state, state.text, inputs.keys.image, torch.full((8,), place / 70))[0] for place in range(70)]
    )
    counts = torch.bincount(drawn, minlength=8)
    assert counts.tolist() == [70] * 8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__text__layers": 0}, "needs model.fusion.kind single_stream"),
        (KIND | {"model__text__layers": 0}, "objectives.contrastive"),
        (WORDLESS | {"data__validation": "somewhere"}, "data.validation empty"),
    ],
)
def test_objectives_that_need_text_features_are_refused_without_text_layers(changes, says):
    with pytest.raises(RecipeError, match=says):
        tiny.recipe(**changes)


def test_a_model_without_text_layers_has_no_feature_to_encode_but_matches(tmp_path):
    loaded = ImageTextModel(tiny.model(tiny.recipe(**WORDLESS)), tiny.tokenizer(), tmp_path, "pretrained", "cpu")
    with pytest.raises(CheckpointError, match="no text layers"):
        loaded.encode_text(["a red square"])
    images = tiny.batch(2)["images"][0]
    assert (((probability := loaded.match(images, ["a red square", "a blue circle"])) > 0) & (probability < 1)).all()


def test_word_maps_are_of_the_words_attention_to_patches(model):
    batch = tiny.batch(2)
    images, ids, mask = batch["images"][0], batch["ids"], batch["mask"]
    tokens = model.image_encoder(images)
    joined, both = model.fusion_encoder.join(
        model.text_encoder(ids, mask), mask, model.fusion_encoder.prepare_images(tokens)
    )
    layer = model.fusion_encoder.layers[0]
    output, weights = run_with_attention(layer, joined, both, None)
    torch.testing.assert_close(output, layer(joined, both))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    maps = attention_maps(model, tokens, ids, mask, 0)
    torch.testing.assert_close(maps.flatten(2), weights.mean(1)[:, : ids.shape[1], ids.shape[1] + 1 :])
    assert word_maps(model, images, ids, mask).shape == maps.shape == (2, tiny.CAPTION_WORDS, 2, 2)


def test_zero_3_on_two_processes_computes_what_one_does(gloo_pool, lone_process):
    changes = KIND | {"training__zero_stage": 3, "training__checkpoint_activations": True}
    two = gloo_pool.run(engine_jobs.train, changes, 2)[0]
    one = lone_process.run(engine_jobs.train, KIND | {"training__zero_stage": 0}, 2)[0]
    for mine, theirs in zip(two.losses, one.losses, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for name, moment in one.state.moments.items():
        noise = 1e-7 if "bias" in name else 0.0  # of biases of keys, whose gradient is zero
        assert (two.state.moments[name] - moment).abs().max() <= 1e-4 * moment.abs().max() + noise, name
