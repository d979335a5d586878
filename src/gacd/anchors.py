"""The anchor bank: a frozen teacher's features of a whole training set, computed once.

Features are kept raw (before the projection, which is still learned), in bfloat16 by default, with
labels and the teacher's confidence. A bank lives on a device, in host memory, or in a file that is
mapped rather than read, so that a draw touches only the rows it draws.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gacd.errors import UserError, unknown
from gacd.models.base import Backbone, check_backbone
from gacd.models.modes import evaluating
from gacd.progress import progress
from gacd.shapes import Batch, Labels, PerSample
from gacd.storage import load_tensors, save_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Fingerprint(NamedTuple):
    """What a bank was made of: a short hash or a name for each part."""

    teacher: str
    data: str
    preprocessing: str


class Anchors(NamedTuple):
    """Anchors at hand: some rows of a bank, or all of them.

    `labels_M` are the classes, or, in a bank without labels, the rows themselves, so that negatives
    are other instances (the images' labels are then their rows as well). `index_M` are the rows;
    None for all of them in order.
    """

    features_MD: Float[Tensor, "M D"]
    labels_M: Int[Tensor, " M"]
    weights_M: Float[Tensor, " M"]
    index_M: Int[Tensor, " M"] | None


class AnchorBank:
    """Raw teacher features [M, D], labels [M] or None, and weights [M].

    A row's weight is the teacher's softmax probability of its true class, in float32; 1 where there
    are no labels. Row j belongs to the image of index j. Nothing here is ever differentiated.

    Source: Bai et al. 2020 (arXiv:2009.09922), Algorithm 1 for the weights.
    """

    def __init__(
        self,
        features_MD: Float[Tensor, "M D"],
        labels_M: Int[Tensor, " M"] | None,
        weights_M: Float[Tensor, " M"],
        fingerprint: Fingerprint,
    ) -> None:
        self.features_MD, self.labels_M, self.weights_M = features_MD, labels_M, weights_M
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.features_MD)

    def __deepcopy__(self, memo: dict[int, object]) -> "AnchorBank":
        return self  # constant, and large: copies of a method that holds it share it

    def normalised(self) -> "AnchorBank":
        """The same rows with weights of mean 1."""
        weights_M = self.weights_M / self.weights_M.mean()
        return AnchorBank(self.features_MD, self.labels_M, weights_M, self.fingerprint)

    @classmethod
    def build(
        cls,
        teacher: Backbone,
        batches: Iterable[Batch],
        *,
        size: int,
        fingerprint: Fingerprint,
        dtype: str = "bfloat16",
        labelled: bool = True,
        show_progress: bool = True,
    ) -> "AnchorBank":
        """One pass of the teacher, in eval mode, over every image of a set of `size`, in any order.

        Batches are of images, labels and rows. The bank ends up where the teacher is. Raises a
        UserError where rows are missing or twice.
        """
        if dtype not in DTYPES:
            raise unknown("dtype of the anchor bank", dtype, DTYPES)
        check_backbone(teacher)
        device = next(teacher.parameters()).device
        bank = cls(
            torch.empty(size, teacher.num_features, dtype=DTYPES[dtype], device=device),
            torch.empty(size, dtype=torch.int64, device=device) if labelled else None,
            torch.ones(size, device=device),
            fingerprint,
        )
        seen_M = torch.zeros(size, dtype=torch.int64)
        with (
            evaluating(teacher),
            torch.no_grad(),
            progress(size, "anchor bank", enabled=show_progress) as bar,
        ):
            for batch in batches:
                if len(batch) != 3:
                    raise UserError(
                        f"batches of an anchor bank have 3 parts, not {len(batch)}: images, labels "
                        "and the row of each image in the data set"
                    )
                images, labels_B, index_B = (part.to(device) for part in batch)
                labels_B, rows_B = labels_B.long(), index_B.cpu().long()
                if len(rows_B) and (last := int(rows_B.max())) >= size:
                    raise UserError(f"an anchor bank of size {size} has no row {last}: mend size")
                if not seen_M.any():
                    teacher.check(images.shape[-1], trains=False)
                features_BD = teacher.forward_features(images)
                bank.features_MD[index_B] = features_BD.to(DTYPES[dtype])
                if bank.labels_M is not None:
                    logits_BK = teacher.forward_head(features_BD).float()
                    bank.labels_M[index_B] = labels_B
                    bank.weights_M[index_B] = true_class_probability(logits_BK, labels_B)
                seen_M.index_add_(0, rows_B, torch.ones_like(rows_B))
                bar.advance(len(images))
        if not bool((seen_M == 1).all()):
            raise UserError(
                f"an anchor bank needs each of its {size} images once: "
                f"{int((seen_M == 0).sum())} are missing, {int((seen_M > 1).sum())} came twice"
            )
        return bank

    def check(self, labels_N: Int[Tensor, " N"], width: int) -> None:
        """Refuse images of other labels than the rows', or a teacher of another width."""
        if len(self) != len(labels_N):
            raise UserError(
                f"the anchor bank has {len(self)} rows, but there are {len(labels_N)} training "
                "images: build it of these"
            )
        if self.labels_M is not None and not torch.equal(self.labels_M.cpu(), labels_N.cpu()):
            raise UserError(
                "the anchor bank's labels are not those of the training images: build it of these"
            )
        if self.features_MD.shape[1] != width:
            raise UserError(
                f"the anchor bank's features are {self.features_MD.shape[1]} wide, and the "
                f"teacher's {width}: build it of this teacher"
            )

    def save(self, path: Path | str) -> None:
        """Write the bank as one safetensors file."""
        tensors = {"features": self.features_MD, "weights": self.weights_M}
        if self.labels_M is not None:
            tensors["labels"] = self.labels_M
        save_tensors(path, tensors, self.fingerprint._asdict())

    @classmethod
    def load(cls, path: Path | str, *, expected: Fingerprint | None = None) -> "AnchorBank":
        """A saved bank on the CPU, mapped from the file, not read.

        Raises UserError where the file is no bank, or one of another teacher, data set or
        preprocessing than `expected`.
        """
        tensors, meta = load_tensors(path, kept=False)
        if not {"features", "weights"} <= tensors.keys() or not meta.keys() >= set(
            Fingerprint._fields
        ):
            raise UserError(f"{path}: not an anchor bank")
        found = Fingerprint(**{name: meta[name] for name in Fingerprint._fields})
        for name, is_, should in zip(Fingerprint._fields, found, expected or found, strict=True):
            if is_ != should:
                raise UserError(
                    f"{path}: built with another {name} ({is_}, not {should}); "
                    "delete it to build it anew"
                )
        return cls(tensors["features"], tensors.get("labels"), tensors["weights"], found)

    def to(self, device: torch.device) -> "AnchorBank":
        """The bank on another device. On the CPU a bank mapped from a file stays mapped."""
        labels_M = None if self.labels_M is None else self.labels_M.to(device)
        return AnchorBank(
            self.features_MD.to(device), labels_M, self.weights_M.to(device), self.fingerprint
        )

    def all(self) -> Anchors:
        """Every row in order, as views: the estimator `exact`."""
        labels_M = self.labels_M
        if labels_M is None:
            labels_M = torch.arange(len(self), device=self.features_MD.device)
        return Anchors(self.features_MD, labels_M, self.weights_M, None)

    def rows(self, index_M: Int[Tensor, " m"], *, device: torch.device | None = None) -> Anchors:
        """Copies of some rows, on `device` (the bank's own by default): the estimator `sampled`."""
        index_M = index_M.to(self.features_MD.device)
        device = self.features_MD.device if device is None else device
        labels_M = index_M if self.labels_M is None else self.labels_M.index_select(0, index_M)
        return Anchors(
            self.features_MD.index_select(0, index_M).to(device),
            labels_M.to(device),
            self.weights_M.index_select(0, index_M).to(device),
            index_M.to(device),
        )

    def draw(
        self, k: int, generator: torch.Generator, *, balanced: bool = False
    ) -> Int[Tensor, " {k}"]:
        """k rows, uniformly and with replacement; `balanced`: first a class, then one of its rows.

        Balanced draws estimate a loss whose classes weigh the same, whatever their sizes.
        """
        device = generator.device
        if not balanced:
            return torch.randint(len(self), (k,), generator=generator, device=device)
        order_M, start_K, count_K = self._by_class
        class_k = torch.randint(len(count_K), (k,), generator=generator, device=device)
        class_k = class_k.to(order_M.device)
        uniform_k = torch.rand(k, generator=generator, device=device, dtype=torch.float64)
        place_k = (uniform_k.to(order_M.device) * count_K[class_k]).long()
        return order_M[start_K[class_k] + place_k]

    @cached_property
    def _by_class(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows sorted by class; where each class that occurs starts; how many rows it has."""
        if self.labels_M is None:
            raise UserError("class-balanced drawing needs a bank with labels")
        count_K = self.labels_M.bincount()
        count_K = count_K[count_K > 0]
        return self.labels_M.argsort(stable=True), count_K.cumsum(0) - count_K, count_K


def true_class_probability(logits_BK: Float[Tensor, "B K"], labels_B: Labels) -> PerSample:
    """w_i = softmax(logits_i)[y_i], in float32: how far a teacher can be trusted on an image."""
    return logits_BK.float().softmax(1).gather(1, labels_B[:, None].long())[:, 0]


def check_width(width: int, features: int) -> None:
    """Refuse more principal components than there are features."""
    if not 1 <= width <= features:
        raise UserError(
            f"a projection to {width} principal components needs features at least as wide, "
            f"not {features}"
        )


def principal_projection(
    features_MD: Float[Tensor, "M D"], width: int
) -> tuple[Float[Tensor, "E D"], Float[Tensor, " E"]]:
    """Weight and bias of a projection onto the leading principal components: a frozen P_t.

    features W' + b = (features - mean) V, V the `width` leading eigenvectors of the covariance.
    Raises UserError where `width` is more than the features have.
    """
    check_width(width, features_MD.shape[1])
    wide_D = features_MD.new_zeros(features_MD.shape[1], dtype=torch.float64)
    total, second = wide_D, wide_D.new_zeros(len(wide_D), len(wide_D))
    for start in range(0, len(features_MD), 8192):
        chunk = features_MD[start : start + 8192].double()
        total, second = total + chunk.sum(0), second + chunk.T @ chunk
    mean_D = total / len(features_MD)
    covariance_DD = second / len(features_MD) - mean_D[:, None] * mean_D
    weight_ED = torch.linalg.eigh(covariance_DD).eigenvectors[:, -width:].flip(1).T
    return weight_ED.float().contiguous(), -(weight_ED @ mean_D).float()
