"""The projection of a network's features into the embedding that teacher and student share."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from gacd.shapes import Features


class Projection(nn.Module):
    """normalise(W f + b): [B, D] -> [B, E], each row of Euclidean length 1 (CRD, Tian et al. 2020).

    W and b are uniform in ±1/sqrt(D), drawn from `seed` alone. Features may be stored in half
    precision and autocast may be on: the lengths are taken in float32 at least.
    """

    def __init__(self, features: int, embedding: int = 128, *, seed: int) -> None:
        super().__init__()
        # By way of the meta device, where the layer's own initialisation draws no numbers.
        self.linear = nn.Linear(features, embedding, device="meta").to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.linear.parameters():
            nn.init.uniform_(parameter, -(features**-0.5), features**-0.5, generator=generator)

    def forward(self, features: Features) -> Float[Tensor, "B E"]:
        """Unit embeddings of raw features."""
        out: Tensor = self.linear(features.to(self.linear.weight.dtype))
        return normalize(out.to(torch.promote_types(out.dtype, torch.float32)), dim=1)
