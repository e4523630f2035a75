"""A codebook's health tells a formed codebook from one that lies elsewhere; k-means against scikit-learn's."""

from __future__ import annotations

import pytest
import tiny
import torch
from sklearn.cluster import KMeans

from pretrain.codebook_health import CodebookHealth, has_formed, spherical_kmeans, warning

CENTRES = tiny.unit(8, 16, seed=1)


def clustered(count: int, seed: int) -> torch.Tensor:
    """Features around the eight centres, in turn."""
    torch.manual_seed(seed)
    return torch.nn.functional.normalize(
        CENTRES.repeat(-(-count // 8), 1)[:count] + 0.05 * torch.randn(count, 16), dim=-1
    )


IMAGE, TEXT, CAPTION_IMAGE = clustered(64, 2), clustered(128, 3), torch.arange(128) % 64


def test_the_true_centres_are_a_formed_codebook():
    health = CodebookHealth()
    first = health.measure(IMAGE, TEXT, CAPTION_IMAGE, CENTRES)
    second = health.measure(IMAGE, TEXT, CAPTION_IMAGE, CENTRES)
    assert "codebook_formed" not in first and second["codebook_formed"] == 1 and second["codebook_kept"] == 100
    assert second["codebook_agreement"] == 100, "image and caption come from the same centre"
    assert second["codebook_perplexity"] == pytest.approx(8, rel=1e-4)
    assert second["codebook_nearest"] == pytest.approx(second["codebook_nearest_kmeans"], abs=0.01)
    assert warning(second) is None


def test_codewords_opposite_the_features_are_told_in_one_line():
    figures = CodebookHealth().measure(IMAGE, TEXT, CAPTION_IMAGE, -CENTRES.mean(0, keepdim=True).expand(8, 16))
    assert "has not formed" in str(warning(figures))
    assert not has_formed(figures | {"codebook_kept": 100.0}, 8)
    assert figures["codebook_cones_cosine"] < 0 and figures["codebook_codeword_cone"] == pytest.approx(
        float(CENTRES.mean(0).square().sum())
    )


def test_kmeans_is_as_near_as_scikit_learns():
    features = torch.cat([tiny.unit(300, 16, seed=5), IMAGE])
    theirs = KMeans(8, n_init=1, random_state=0).fit(features.numpy()).cluster_centers_
    theirs = torch.nn.functional.normalize(torch.from_numpy(theirs), dim=-1)
    near = [float((features @ centres.T).amax(-1).mean()) for centres in (spherical_kmeans(features, 8), theirs)]
    assert near[0] >= 0.97 * near[1]


def test_too_few_features_for_kmeans_leave_it_out():
    figures = CodebookHealth().measure(IMAGE[:8], TEXT[:8], torch.arange(8), CENTRES)
    assert "codebook_nearest_kmeans" not in figures and "codebook_formed" not in figures
