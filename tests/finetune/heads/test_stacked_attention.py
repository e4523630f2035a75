"""Region-word scores against SCAN's own figures, and against the formula written out with its attended vectors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from finetune.heads.stacked_attention import Comparison, mean_scores, pair_scores, word_attention


@pytest.fixture(scope="module")
def fixture(shared_data):
    folder = shared_data / "fixtures" / "stacked_cross_attention"
    inputs = load_file(folder / "inputs.safetensors")
    mask = torch.arange(inputs["word_tokens"].shape[1])[None] < inputs["word_counts"][:, None]
    return inputs["image_tokens"], inputs["word_tokens"], mask, load_file(folder / "expected.safetensors")


def settings(name: str) -> dict:
    direction, norm, pooling, sharpness = name.split(".")
    return {"direction": direction, "comparison": Comparison(norm, pooling, float(sharpness[6:]))}


def written_out(regions, words, count, direction, sharpness=9.0):
    """One pair in float64, as the paper has it: HAT's normalisation and mean, the attended vectors made."""
    regions, words = regions.double(), words[:count].double()
    query, context = (regions, words) if direction == "image_to_text" else (words, regions)
    similarity = torch.nn.functional.leaky_relu(query @ context.T, 0.1)
    attention = torch.softmax(sharpness * similarity / (similarity.norm(dim=0, keepdim=True) + 1e-8), dim=1)
    return torch.nn.functional.cosine_similarity(query, attention @ context, dim=-1).mean()


def test_scores_match_every_variant_of_the_fixture(fixture):
    regions, words, mask, expected = fixture
    for name, target in expected.items():
        actual = pair_scores(regions, words, mask, **settings(name))
        torch.testing.assert_close(actual, target, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert len(expected) == 40


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_single_images_single_words_and_padding_do_not_change_scores(fixture, direction):
    regions, words, mask, _ = fixture
    whole = pair_scores(regions, words, mask, direction)
    alone = torch.cat([pair_scores(regions[i : i + 1], words, mask, direction) for i in range(len(regions))])
    torch.testing.assert_close(alone, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        pair_scores(regions, words.masked_fill(~mask[..., None], 1e4), mask, direction), whole, atol=1e-6, rtol=0
    )
    one = torch.zeros_like(mask)
    one[:, 0] = True
    actual = pair_scores(regions, words, one, direction)
    for image in range(len(regions)):
        assert actual[image, 2].item() == pytest.approx(
            written_out(regions[image], words[2], 1, direction).item(), abs=1e-5
        )


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("count", [20, 300])  # 300 regions: the Gram matrix is read in blocks
def test_values_and_gradients_equal_the_written_out_formula(direction, count):
    torch.manual_seed(count)
    regions = torch.randn(2, count, 16, dtype=torch.float64).mul_(0.3)
    words, lengths = torch.randn(3, 6, 16, dtype=torch.float64), [6, 1, 4]
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    weights = torch.randn(2, 3)
    leaves = [tensor.clone().requires_grad_() for tensor in (regions, words)]
    actual = pair_scores(*leaves, mask, direction)
    (actual * weights).sum().backward()
    exact = [tensor.clone().requires_grad_() for tensor in (regions, words)]
    target = torch.stack(
        [
            torch.stack([written_out(exact[0][i], exact[1][j], lengths[j], direction) for j in range(3)])
            for i in range(2)
        ]
    )
    (target * weights).sum().backward()
    torch.testing.assert_close(actual.double(), target, atol=1e-5, rtol=0)
    for mine, theirs in zip(leaves, exact, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-3)
    assert not leaves[1].grad[1, 1:].any(), "what stands behind a caption gets no gradient"


def test_tokens_of_zero_give_a_score_and_a_gradient():
    regions = torch.zeros(1, 4, 8, requires_grad=True)
    words = torch.zeros(2, 3, 8, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    for direction in ("image_to_text", "text_to_image"):
        score = pair_scores(regions, words, mask, direction)
        score.sum().backward()
        assert torch.equal(score, torch.zeros(1, 2))
    assert regions.grad.isfinite().all() and words.grad.isfinite().all()


def test_mean_pooling_compares_by_cosine(fixture):
    regions, words, mask, _ = fixture
    actual = mean_scores(regions, words, mask)
    for caption in range(len(words)):
        mean = words[caption][mask[caption]].mean(0)
        target = torch.nn.functional.cosine_similarity(regions.mean(1), mean[None], dim=-1)
        torch.testing.assert_close(actual[:, caption], target, atol=1e-6, rtol=0)


def test_attention_for_pictures_is_a_distribution_over_its_context(fixture):
    regions, words, mask, _ = fixture
    there = word_attention(regions[0], words[0], "text_to_image")
    back = word_attention(regions[0], words[0], "image_to_text")
    assert there.shape == back.shape == (9, 11)
    torch.testing.assert_close(there.sum(1), torch.ones(9))
    torch.testing.assert_close(back.sum(0), torch.ones(11))
