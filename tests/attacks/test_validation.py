"""What is counted on validation images: PGD-10 in steps of eps / 4 from a random start."""

import torch
from torch import Tensor, nn

from gacd.attacks.objectives import cross_entropy
from gacd.attacks.pgd import pgd
from gacd.attacks.threat import ThreatModel
from gacd.attacks.validation import count_right
from gacd.shapes import Batch


def test_counts_are_those_of_pgd_10_by_hand(generator: torch.Generator) -> None:
    weight = 4 * torch.randn(3, 8, generator=generator)
    mix = torch.randn(8, 4, generator=generator)
    images = torch.rand(30, 1, 2, 2, generator=generator)

    def network(x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x.flatten(1) - 0.5, mix).sin(), weight)

    labels = network(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3  # some are wrong without attack
    seen: list[Tensor] = []

    def predictor(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            seen.append(x)
        return network(x)

    batches = [Batch(images[rows], labels[rows], rows) for rows in torch.arange(30).split(20)]
    threat = ThreatModel(eps=0.1)
    counts = count_right(predictor, batches, threat, generator=torch.Generator().manual_seed(5))
    noise, right = torch.Generator().manual_seed(5), [0, 0]
    for batch, clean, attacked in zip(batches, seen[::2], seen[1::2], strict=True):
        x_adv = pgd(
            cross_entropy(network, batch.labels), batch.images, threat, steps=10, step_size=0.025,
            generator=noise,
        )  # fmt: skip
        torch.testing.assert_close(attacked, x_adv)
        assert torch.equal(clean, batch.images)
        for i, x in enumerate((batch.images, x_adv)):
            right[i] += sum((network(x).argmax(1) == batch.labels).tolist())
    assert counts.tolist() == [*right, 30]
    assert 0 < right[1] < right[0] == 24
