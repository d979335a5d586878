"""The legend of dimension letters, and the array types that carry them.

| letter | meaning |
|---|---|
| `B` | images in a batch |
| `C H W` | channels, height, width of an image |
| `K` | classes |
| `D` | width of a backbone's penultimate feature (`Dt` teacher, `Ds` student) |
| `E` | width of the shared, normalised embedding (the paper's d, 128) |
| `M` | anchors in the bank (the size of the training set) |
| `N` | images in a data set |

Tensor names carry them as suffixes where a name alone would not tell: `student_BE`, `bank_MD`.
The annotations are executed in the test suite (jaxtyping with beartype) and cost nothing elsewhere.
"""

from typing import NamedTuple

from jaxtyping import Float, Int, UInt8
from torch import Tensor

Images = Float[Tensor, "B C H W"]
"""Images in [0, 1], NCHW, channels-last in memory."""
Labels = Int[Tensor, " B"]
"""True classes, 0 to K - 1."""
Logits = Float[Tensor, "B K"]
Features = Float[Tensor, "B D"]
"""Penultimate (pooled, pre-logit) features."""
PerSample = Float[Tensor, " B"]
"""One number per image: a loss before its reduction, an attack's objective, a weight."""
Scalar = Float[Tensor, ""]
PixelArray = UInt8[Tensor, "N C H W"]
"""A data set as it is stored: bytes, NCHW."""


class Batch(NamedTuple):
    """What a training step is given.

    `index` is each image's row in its training split, and so its row in the anchor bank.
    """

    images: Images
    labels: Labels
    index: Int[Tensor, " B"]  # type: ignore[assignment]  # a tuple has a method of this name
