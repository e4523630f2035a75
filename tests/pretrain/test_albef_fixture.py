"""ALBEF's own numbers for a reduced model: its checkpoint under our names gives its features, logits, losses and gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from pretrain.config import ContrastiveConfig
from pretrain.model.alignment_model import AlignmentModel, TextBatch
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked_language import masked_language_loss, word_logits
from pretrain.objectives.matching import draw_negatives
from pretrain.objectives.state import Keys, MaskedText, MicroBatch, StudentState
from pretrain.teacher import Teacher
from pretrain.weights.albef import Albef as Read
from pretrain.weights.albef import Heads, build_model, read_albef, translate_names

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@dataclass
class Albef:
    sizes: dict
    checkpoint: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    gradients: dict[str, Tensor]
    read: Read
    model: AlignmentModel
    text: TextBatch

    @property
    def image(self) -> Tensor:
        return self.inputs["image"]

    def teacher(self) -> Teacher:
        """The teacher after the one update that the figures are made with."""
        teacher = Teacher(self.model, self.sizes["momentum"])
        teacher.load(self.read.teacher)
        teacher.update((name, parameter.data) for name, parameter in self.model.named_parameters())
        return teacher

    def fuse(self, model: AlignmentModel, image_tokens: Tensor, ids: Tensor) -> Tensor:
        states = model.text_encoder(ids, self.text.mask)
        return model.fusion_encoder(states, self.text.mask, model.fusion_encoder.prepare_images(image_tokens))


@pytest.fixture(scope="module")
def albef(shared) -> Albef:
    folder = shared / "fixtures" / "albef_small"
    sizes = json.loads((folder / "sizes.json").read_text())
    checkpoint = torch.load(folder / "checkpoint.pth", weights_only=True)["model"]
    inputs, expected, gradients = (
        load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected", "gradients")
    )
    read = read_albef(folder / "checkpoint.pth", heads=Heads(image=sizes["heads"]))
    assert not read.unused
    model, fresh = build_model(read)
    assert not fresh
    text = TextBatch(inputs["input_ids"], inputs["attention_mask"].bool())
    return Albef(sizes, checkpoint, inputs, expected, gradients, read, model.eval(), text)


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, **TOLERANCE)


def close_to_scale(actual: Tensor, wanted: Tensor) -> None:
    """To 1e-5 of the largest entry: word logits reach 17, and the figures themselves are 1.7e-5 from the float64 result."""
    scale = float(wanted.abs().max())
    torch.testing.assert_close(actual / scale, wanted / scale, atol=1e-5, rtol=0)


def test_every_tensor_of_the_checkpoint_is_mapped(albef):
    student = albef.read.student
    assert set(student) == {name for name, _ in albef.model.named_parameters()} - {"temperature.logit"}
    assert set(albef.read.teacher) == set(albef.teacher().averages)
    tied = albef.checkpoint["text_encoder.cls.predictions.decoder.weight"]
    assert torch.equal(tied, student["text_encoder.words.weight"])


def test_encoders_give_albefs_features(albef):
    tokens = albef.model.image_encoder.vit(albef.image)
    states = albef.model.text_encoder(albef.text.ids, albef.text.mask)
    close(tokens, albef.expected["image_tokens"])
    close(states[albef.text.mask], albef.expected["text_tokens"][albef.text.mask])
    close(albef.model.image_features(tokens), albef.expected["image_feature"])
    close(albef.model.text_features(states, albef.text.mask), albef.expected["text_feature"])


def test_fusion_and_heads_give_albefs_outputs(albef):
    tokens = albef.model.image_encoder.vit(albef.image)
    fused = albef.fuse(albef.model, tokens, albef.text.ids)
    close(fused[albef.text.mask], albef.expected["fusion_tokens"][albef.text.mask])
    close(albef.model.matching_logits(fused), albef.expected["itm_logits_matched"])
    rolled = albef.fuse(albef.model, tokens.roll(1, 0), albef.text.ids)
    close(albef.model.matching_logits(rolled), albef.expected["itm_logits_image_rolled"])
    logits = albef.model.masked_language_logits(albef.fuse(albef.model, tokens, albef.inputs["masked_input_ids"]))
    close_to_scale(logits[albef.text.mask], albef.expected["mlm_logits"][albef.text.mask])


def test_the_teacher_equals_albefs_after_one_update(albef):
    teacher = albef.teacher()
    close(teacher.averages["image_projection.weight"], albef.expected["teacher_vision_proj_after_update"])
    tokens = teacher.model.image_encoder.vit(albef.image)
    close(teacher.model.image_features(tokens), albef.expected["teacher_image_feature"])
    states = teacher.model.text_encoder(albef.text.ids, albef.text.mask)
    close(teacher.model.text_features(states, albef.text.mask), albef.expected["teacher_text_feature"])
    logits = teacher.model.masked_language_logits(albef.fuse(teacher.model, tokens, albef.inputs["masked_input_ids"]))
    close_to_scale(logits[albef.text.mask], albef.expected["mlm_teacher_logits"][albef.text.mask])


def test_weights_of_hard_negatives_equal_albefs(albef):
    """Draws at 200,000 even points of the unit interval count the weights out."""
    points, size = 200_000, albef.sizes["batch"]
    draws = ((torch.arange(points, dtype=torch.float64) + 0.5) / points)[:, None].expand(-1, size)
    same = torch.eye(size, dtype=torch.bool)
    expected, temperature = albef.expected, albef.sizes["temperature"]
    of_image = expected["image_feature"] @ expected["teacher_text_feature"].T / temperature
    of_text = expected["text_feature"] @ expected["teacher_image_feature"].T / temperature
    for logits, name in ((of_image, "itm_weight_image_to_text"), (of_text, "itm_weight_text_to_image")):
        column, _ = draw_negatives(logits.expand(points, -1, -1), same.expand(points, -1, -1), draws)
        shares = torch.stack([torch.bincount(column[:, row], minlength=size) / points for row in range(size)])
        weights = expected[name]
        torch.testing.assert_close(shares, weights / weights.sum(-1, keepdim=True), atol=2e-5, rtol=0)


def losses(albef: Albef) -> dict[str, Tensor]:
    """ALBEF's three losses through our objectives, with a graph to the student."""
    model, teacher = albef.model, albef.teacher()
    size = albef.sizes["batch"]
    queue = (albef.checkpoint["image_queue"].T, albef.checkpoint["text_queue"].T)
    with torch.no_grad():
        teacher_tokens = teacher.model.image_encoder.vit(albef.image)
        new = (
            teacher.model.image_features(teacher_tokens),
            teacher.model.text_features(teacher.model.text_encoder(albef.text.ids, albef.text.mask), albef.text.mask),
        )
    image_keys, text_keys = (torch.cat(pair) for pair in zip(new, queue, strict=True))
    keys = Keys(image_keys, text_keys, torch.arange(len(image_keys)))
    tokens = model.image_encoder.vit(albef.image)
    states = model.text_encoder(albef.text.ids, albef.text.mask)
    rows, nothing = torch.arange(size), torch.zeros(0)
    batch = MicroBatch(albef.image, albef.text, rows, rows, nothing, keys, albef.sizes["alpha"])
    state = StudentState(model, batch, tokens, states)
    contrastive = Contrastive(ContrastiveConfig(intra_modal=False))(state)["contrastive"]

    both = torch.cat([rows, rows.roll(1)])
    fused = model.fusion_encoder(states.repeat(2, 1, 1), albef.text.mask.repeat(2, 1), state.prepared_images, both)
    labels = torch.cat([torch.ones_like(rows), torch.zeros_like(rows)])
    matching = functional.cross_entropy(model.matching_logits(fused), labels)

    chosen = albef.inputs["mlm_labels"] != -100
    altered, places = TextBatch(albef.inputs["masked_input_ids"], albef.text.mask), chosen.flatten().nonzero()[:, 0]
    with torch.no_grad():
        opinion = word_logits(
            teacher.model, altered, places, teacher.model.fusion_encoder.prepare_images(teacher_tokens)
        )
    masked = MaskedText(altered, places, albef.inputs["mlm_labels"][chosen], float(chosen.sum()), opinion)
    words = word_logits(model, altered, places, state.prepared_images)
    return {
        "itc": contrastive,
        "itm": matching,
        "mlm": masked_language_loss(words, masked, albef.sizes["alpha"]),
    }


@pytest.mark.parametrize(
    ("name", "figure"), [("itc", "loss_itc"), ("itm", "loss_itm_matched_and_rolled"), ("mlm", "loss_mlm")]
)
def test_losses_and_all_gradients_equal_albefs(albef, name, figure):
    actual = losses(albef)[name]
    close(actual, albef.expected[figure])
    theirs = {
        key.removeprefix(f"{name}/"): gradient
        for key, gradient in albef.gradients.items()
        if key.startswith(f"{name}/")
    }
    of_temperature = theirs.pop("temp", None)
    wanted, _ = translate_names(theirs, albef.sizes["fusion_layer"])
    parameters = dict(albef.model.named_parameters())
    gradients = dict(
        zip(parameters, torch.autograd.grad(actual, list(parameters.values()), allow_unused=True), strict=True)
    )
    own_temperature = gradients.pop("temperature.logit")
    assert {key for key, gradient in gradients.items() if gradient is not None} == set(wanted)
    for key, gradient in wanted.items():
        torch.testing.assert_close(gradients[key], gradient, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}")
    assert (own_temperature is None) == (of_temperature is None)
    if of_temperature is not None:
        # Theirs is with respect to the temperature; ours to the parameter it is a function of.
        (slope,) = torch.autograd.grad(albef.model.temperature(), parameters["temperature.logit"])
        close(own_temperature, (of_temperature * slope).view(1))
