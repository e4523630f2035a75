"""The dual head's loss."""

import dual_jobs
import pytest
import torch
from torch.nn.functional import normalize

from finetune.heads.dual import dual_loss


@pytest.fixture
def batch():
    torch.manual_seed(0)
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])  # the second and the fourth are captions of one image
    return torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64), ids


def test_the_loss_is_symmetric_cross_entropy_with_all_captions_of_an_image_as_positives(batch):
    image, text, ids = normalize(batch[0], dim=-1), normalize(batch[1], dim=-1), batch[2]
    similarity = image @ text.T / 0.1
    expected = 0.0
    for scores in (similarity, similarity.T):
        for row in range(8):
            positives = [column for column in range(8) if ids[column] == ids[row]]
            log_softmax = scores[row] - torch.logsumexp(scores[row], 0)
            expected -= sum(log_softmax[column] for column in positives) / len(positives) / 16
    actual = dual_loss(image, text, ids, torch.tensor([0.1], dtype=torch.float64))
    assert torch.allclose(actual, expected, rtol=1e-12)


def test_two_ranks_have_the_loss_and_the_gradients_of_one_process(batch, gloo_pool):
    loss, image, text = dual_jobs.loss_and_gradients(*batch, 0.1)
    parts = gloo_pool.run(dual_jobs.on_this_rank, *batch, 0.1)
    # DDP averages gradients over the ranks; a rank's rows have all of their gradient there, so the average halves it.
    assert torch.allclose(sum(part[0] for part in parts) / 2, loss, rtol=1e-12)
    assert torch.allclose(torch.cat([part[1] for part in parts]) / 2, image, rtol=1e-10)
    assert torch.allclose(torch.cat([part[2] for part in parts]) / 2, text, rtol=1e-10)
