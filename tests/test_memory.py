import math

import pytest
import torch
import torch.nn.functional as F

from gacd.errors import UserError
from gacd.losses.contrastive import crd_nce
from gacd.memory import MomentumMemory, Normaliser, OtherClasses


def memory(generator: torch.Generator) -> MomentumMemory:
    return MomentumMemory(12, 4, momentum=0.25, generator=generator)


def test_rows_start_on_the_unit_sphere_and_are_read_as_copies(generator: torch.Generator) -> None:
    bank = memory(generator)
    student, teacher = bank.read(torch.tensor([[3, 5], [0, 3]]))
    torch.testing.assert_close(student.norm(dim=2), torch.ones(2, 2))
    assert torch.equal(student[0, 0], bank.student_ME[3])
    assert torch.equal(teacher[1, 0], bank.teacher_ME[0])
    assert (bank.student_ME * bank.teacher_ME).sum(1).abs().mean() < 0.8  # drawn apart
    before = bank.student_ME.clone()
    student.zero_()
    assert torch.equal(bank.student_ME, before)


def test_write_moves_the_written_rows_only(generator: torch.Generator) -> None:
    bank = memory(generator)
    memories = (bank.student_ME, bank.teacher_ME)
    olds = [memory_ME.clone() for memory_ME in memories]
    news = F.normalize(torch.randn(2, 2, 4, generator=generator), dim=2).requires_grad_()
    bank.write(torch.tensor([7, 2]), *news)
    others = [row for row in range(12) if row not in (7, 2)]
    for memory_ME, old, new in zip(memories, olds, news, strict=True):
        for row, embedding in zip((7, 2), new, strict=True):
            moved = 0.25 * old[row] + 0.75 * embedding
            torch.testing.assert_close(memory_ME[row], moved / moved.norm())
        assert torch.equal(memory_ME[others], old[others])
        assert not memory_ME.requires_grad


def test_scoring_writes_nothing_and_a_state_dict_resumes(generator: torch.Generator) -> None:
    bank = memory(generator)
    state = {name: value.clone() for name, value in bank.state_dict().items()}
    student = torch.randn(2, 4, generator=generator).requires_grad_()
    log_z = torch.tensor(2.0)
    loss = crd_nce(
        student,
        student.detach(),
        *bank.read(torch.tensor([[1, 4, 5], [2, 8, 9]])),
        dataset_size=12,
        student_log_z=log_z,
        teacher_log_z=log_z,
    )
    loss.sum().backward()
    assert student.grad is not None and student.grad.norm() > 0
    assert all(torch.equal(bank.state_dict()[name], value) for name, value in state.items())
    bank.write(torch.tensor([1]), student[:1].detach(), student[:1].detach())
    other = memory(generator)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.student_ME, bank.student_ME)
    assert not torch.equal(other.student_ME, state["student_ME"])


def test_negatives_are_uniform_over_the_other_classes(generator: torch.Generator) -> None:
    """Counts within five standard deviations of uniform; classes unsorted, one of them absent."""
    labels = torch.tensor([4, 0, 1, 0, 4, 4, 1, 0, 0, 3])
    k = 30_000
    drawn = OtherClasses(labels).draw(torch.tensor([0, 4, 3, 1]), k, generator)
    for row, label in zip(drawn, (0, 4, 3, 1), strict=True):
        counts = row.bincount(minlength=10)
        allowed = labels != label
        share = 1 / int(allowed.sum())
        assert bool((counts[~allowed] == 0).all())
        spread = 5 * math.sqrt(k * share * (1 - share))
        assert bool(((counts[allowed] - k * share).abs() < spread).all())


def test_one_class_has_no_negatives(generator: torch.Generator) -> None:
    with pytest.raises(UserError, match="one class"):
        OtherClasses(torch.ones(5).long()).draw(torch.ones(2).long(), 3, generator)


def test_fixed_normalisers() -> None:
    exact, none = Normaliser("exact"), Normaliser("none")
    assert exact.read() is None and not exact.wants_write
    assert none.read() == 0 and not none.wants_write
    none.write(torch.ones(3))
    assert none.read() == 0


def test_the_first_batch_fixes_its_mean() -> None:
    normaliser = Normaliser("first-batch")
    with pytest.raises(UserError, match="written before"):
        normaliser.read()
    normaliser.write(torch.tensor([1.0, 3.0]))
    expected = math.log((math.e + math.e**3) / 2)
    assert normaliser.read() == pytest.approx(expected)
    assert not normaliser.wants_write
    normaliser.write(torch.tensor([50.0]))
    assert normaliser.read() == pytest.approx(expected)


def test_running_follows_and_resumes() -> None:
    normaliser = Normaliser("running", momentum=0.75)
    normaliser.write(torch.tensor([2.0, 2.0]))
    assert normaliser.read() == pytest.approx(2.0)
    normaliser.write(torch.tensor([6.0]))
    assert normaliser.read() == pytest.approx(3.0)
    resumed = Normaliser("running", momentum=0.75)
    resumed.load_state_dict(normaliser.state_dict())
    for one in (normaliser, resumed):
        one.write(torch.tensor([4.0]))
    assert resumed.read() == normaliser.read()


def test_what_was_not_written_is_not_after_loading_it_either() -> None:
    normaliser = Normaliser("first-batch")
    fresh = {name: value.clone() for name, value in normaliser.state_dict().items()}
    normaliser.write(torch.tensor([1.0, 3.0]))
    assert not normaliser.wants_write
    normaliser.load_state_dict(fresh)
    assert normaliser.wants_write
    with pytest.raises(UserError, match="written before"):
        normaliser.read()


def test_bad_names_and_momenta_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(UserError, match="did you mean 'running'"):
        Normaliser("runing")
    with pytest.raises(UserError, match="momentum"):
        Normaliser("running", momentum=1.0)
    with pytest.raises(UserError, match="momentum"):
        MomentumMemory(3, 2, momentum=-0.1, generator=generator)
