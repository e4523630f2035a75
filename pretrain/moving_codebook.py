"""The parts of a codebook that no gradient moves: codewords that are averages of features, and the centres of the two modalities.

Codewords (`model.codebook_update: average`) are those of k-means by transport: a step's plan assigns each teacher feature to codewords,
equally many to each, and a codeword moves to the mean of what it was given, by an exponential moving average as in VQ-VAE (van den Oord
et al. 2017, Appendix A.1). So the contrastive losses cannot drag codewords along, and none of them dies.

Centres (`model.codebook_centered`) are running means of the teacher's image and text features.

Both are buffers of the model. This file keeps them in float32 whatever the engine made of the model's own, and the same on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.config import CodebookConfig, TransportConfig
from pretrain.model.alignment_model import AlignmentModel
from pretrain.objectives.codebook import solve_plans

START_ROUNDS = 10
"""Rounds of k-means by which the codewords start."""


class MovingCodebook:
    """Moves a model's codewords and centres.

    Attributes:
        codewords: (codewords, feature_dim) unit-norm float32, 0 until they start; None where they learn by gradient.
        centres: (2, feature_dim) float32, of image and text features; None where features are not centred.
    """

    def __init__(self, model: AlignmentModel, config: CodebookConfig, device: torch.device) -> None:
        def own(name: str) -> Tensor | None:
            buffer = dict(model.named_buffers()).get(name)
            return None if buffer is None else buffer.detach().to(device, torch.float32, copy=True)

        self.config = config
        self.codewords, self.centres = own("codebook"), own("feature_centres")
        self.starts = self.codewords is not None and not bool(self.codewords.any())
        """Whether the codewords have yet to start."""
        self._has_centres = self.centres is not None and bool(self.centres.any())

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold, by the model's names."""
        named = {"codebook": self.codewords, "feature_centres": self.centres}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def publish(self, model: AlignmentModel) -> None:
        """Let the model use the tensors of this object, in float32."""
        for name, tensor in self.tensors().items():
            setattr(model, name, tensor)

    @torch.no_grad()
    def begin_centres(self, image: Tensor, text: Tensor) -> None:
        """Set the centres to the means of the first batch's features, (samples, feature_dim) each. Later calls do nothing."""
        if self.centres is not None and not self._has_centres:
            self.centres.copy_(torch.stack([image.float().mean(0), text.float().mean(0)]))
            self._has_centres = True

    @torch.no_grad()
    def start_codewords(self, image: Tensor, text: Tensor, transport: TransportConfig, seed: int) -> None:
        """Set the codewords by k-means over features as they meet the codewords, from a random choice of them.

        Args:
            image: (samples, feature_dim).
            text: (samples, feature_dim).
            transport: how plans are solved.
            seed: decides the choice.
        """
        assert self.codewords is not None
        features = torch.cat([image, text]).float()
        random = torch.Generator().manual_seed(seed)
        # Where there are fewer features than codewords, some codewords begin as copies of a feature with noise.
        order = torch.cat([torch.randperm(len(features), generator=random)] * -(-len(self.codewords) // len(features)))
        chosen = features[order[: len(self.codewords)].to(features.device)]
        noise = torch.randn(chosen.shape, generator=random).to(chosen) / chosen.shape[1] ** 0.5
        codewords = functional.normalize(chosen + 0.01 * noise, dim=-1)
        for _ in range(START_ROUNDS):
            solved = solve_plans(image, text, codewords, len(image), transport, averages=True)
            assert solved.averages is not None
            codewords = solved.averages
        self.codewords.copy_(codewords)
        self.starts = False
        self._agree(self.codewords)

    @torch.no_grad()
    def move(self, image: Tensor, text: Tensor, averages: Tensor | None) -> None:
        """Move the centres towards a batch's means, and the codewords towards what the plan assigned to them.

        Args:
            image: the global batch's teacher features (samples, feature_dim).
            text: likewise.
            averages: (codewords, feature_dim) unit-norm; None where no plan was solved, or the codewords stay.
        """
        if self.centres is not None:
            means = torch.stack([image.float().mean(0), text.float().mean(0)])
            self.centres.lerp_(means, 1 - self.config.center_momentum)
            self._agree(self.centres)
        if self.codewords is not None and averages is not None:
            moved = self.codewords.lerp(averages, 1 - self.config.average_momentum)
            self.codewords.copy_(functional.normalize(moved, dim=-1))
            self._agree(self.codewords)

    @staticmethod
    def _agree(tensor: Tensor) -> None:
        """Take the first rank's values. All ranks computed the same, but another device may round otherwise."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast(tensor, 0)
