"""How GACD projects the teacher's features: at every step anew, now and then, or once."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gacd.anchors import AnchorBank, Anchors, principal_projection
from gacd.errors import UserError, unknown
from gacd.losses.contrastive import project_anchors
from gacd.losses.pairs import Pairs
from gacd.models.projection import Projection
from gacd.shapes import Batch, Features

KINDS = ("live", "refreshed", "pca", "identity")
ROWS = 2**16  # of the bank, projected together


class Unit(nn.Module):
    """Features divided by their length: no projection."""

    def forward(self, features: Features) -> Features:
        """[B, D], each row of length 1."""
        return F.normalize(features.float(), dim=1)


class Anchoring(nn.Module):
    """The teacher's projection, and the anchors that go with it.

    | kind | the projection | the anchors |
    |---|---|---|
    | `live` | trains | projected, and differentiated, at every step |
    | `refreshed` | trains at every `refresh`-th step, held between | projected once each time |
    | `pca` | the bank's principal directions | projected once |
    | `identity` | none: the embedding is as wide as the features | normalised once |

    Momentum and weight decay carry a `refreshed` projection on while its copy is held.
    What is projected once is kept where all anchors are used: [M, E], in the bank's dtype.
    """

    def __init__(
        self, bank: AnchorBank, dim: int, *, kind: str = "live", refresh: int = 10, seed: int
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("teacher_projection", kind, KINDS)
        if refresh < 2:
            raise UserError(f"refresh must be at least 2 steps, not {refresh}: 1 is 'live'")
        self.bank = bank
        features = bank.features_MD.shape[1]
        self.refresh = {"live": 1, "refreshed": refresh}.get(kind, 0)  # steps; 0: never
        self.width = features if kind == "identity" else dim
        self.projection: Projection | Unit = Unit()
        if kind != "identity":
            self.projection = Projection(features, dim, seed=seed)
        if kind == "pca" and isinstance(self.projection, Projection):
            weight_ED, bias_E = principal_projection(bank.features_MD, dim)
            self.projection.linear.weight.data.copy_(weight_ED)
            self.projection.linear.bias.data.copy_(bias_E)
            self.projection.requires_grad_(False)
        if kind == "refreshed":
            self.held = copy.deepcopy(self.projection).requires_grad_(False)
            self.age: Tensor
            self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self._age: int | None = None  # `age` without a wait for the device
        self._projected_ME: Tensor | None = None

    @torch.no_grad()
    def advance(self) -> None:
        """One step further. What a live step has made of the projection is held until the next."""
        if self.refresh < 2:
            return
        self._age = (int(self.age) if self._age is None else self._age) + 1
        self.age += 1
        if (self._age - 1) % self.refresh == 1:  # the first after a live one
            self.held.load_state_dict(self.projection.state_dict())
            self._projected_ME = None

    @property
    def is_live(self) -> bool:
        """Whether the projection takes part in this step's gradient."""
        if self.refresh < 2:
            return self.refresh == 1
        return self._age is not None and (self._age - 1) % self.refresh == 0

    @property
    def current(self) -> nn.Module:
        """The projection of this step."""
        return self.held if self.refresh > 1 and not self.is_live else self.projection

    def pairs(
        self, s_BE: Tensor, t_BE: Tensor, batch: Batch, anchors: Anchors, *, temperature: float
    ) -> Pairs:
        """Projected images and positives beside these anchors."""
        anchors_MD, weight_ED, bias_E = anchors.features_MD, None, None
        if isinstance(self.current, Projection):
            weight_ED, bias_E = self.current.linear.weight, self.current.linear.bias
        if not self.is_live:  # then what is to be projected is projected here
            anchors_MD = self._projected(anchors, weight_ED, bias_E)
            weight_ED = bias_E = None
        return Pairs(
            s_BE,
            t_BE,
            anchors_MD,
            index_B=batch.index,
            anchor_index_M=anchors.index_M,
            projection_weight_ED=weight_ED,
            projection_bias_E=bias_E,
            temperature=temperature,
            dataset_size=len(self.bank),
        )

    def _projected(
        self, anchors: Anchors, weight_ED: Tensor | None, bias_E: Tensor | None
    ) -> Tensor:
        if anchors.index_M is not None:
            return project_anchors(anchors.features_MD, weight_ED, bias_E)
        if self._projected_ME is None:
            self._projected_ME = project_anchors(anchors.features_MD, weight_ED, bias_E)
        return self._projected_ME

    @torch.no_grad()
    def class_means(self, num_classes: int, device: torch.device) -> Tensor:
        """[K, E], of length 1: each class's mean embedding over the bank, some rows at a time."""
        anchors = self.bank.all()
        total_KE = torch.zeros(num_classes, self.width, device=device)
        for start in range(0, len(self.bank), ROWS):
            rows = slice(start, start + ROWS)
            t_cE = self.projection(anchors.features_MD[rows].to(device).float())
            classes_cK = F.one_hot(anchors.labels_M[rows].to(device), num_classes)
            total_KE += classes_cK.to(t_cE).T @ t_cE
        return F.normalize(total_KE, dim=1)

    def idle(self) -> Tensor | float:
        """A zero to add to the loss of a step in which parameters rest: ranks expect gradients."""
        if self.refresh < 2 or self.is_live:
            return 0.0
        return 0.0 * torch.stack([p.sum() for p in self.projection.parameters()]).sum()

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._age = self._projected_ME = None
