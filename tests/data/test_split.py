import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.data.split import stratified


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_each_class_keeps_its_share_to_within_one_image(
    labels: list[int], share: float, seed: int
) -> None:
    y = torch.tensor(labels)
    n = round(share * len(y))
    mask = stratified(y, n, seed=seed)
    assert int(mask.sum()) == n
    for label in set(labels):
        exact = n * labels.count(label) / len(labels)
        assert abs(int((y[mask] == label).sum()) - exact) < 1


def test_the_choice_depends_on_the_seed_and_on_nothing_else() -> None:
    y = torch.arange(200) % 5
    first = stratified(y, 50, seed=1)
    torch.manual_seed(99)
    assert first.equal(stratified(y, 50, seed=1))
    assert not first.equal(stratified(y, 50, seed=2))


def test_every_image_is_chosen_equally_often() -> None:
    y = torch.tensor([0] * 6 + [1] * 4)
    times = torch.stack([stratified(y, 5, seed=seed) for seed in range(400)]).double().mean(0)
    assert (times - 0.5).abs().max() < 0.11  # 4.4 standard deviations of a fair coin, 400 tosses
