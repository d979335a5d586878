import json
import struct
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gacd.anchors import AnchorBank, Fingerprint, principal_projection, true_class_probability
from gacd.errors import UserError
from gacd.models.base import Backbone
from gacd.shapes import Batch

MADE_OF = Fingerprint("resnet-1a", "digits-train", "32x32")


class Teacher(Backbone):
    """A linear network whose dropout would spoil features taken in training mode."""

    num_features, num_classes, channels = 5, 3, 1

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.dropout(self.body(x.flatten(1)))

    def forward_head(self, features: Tensor) -> Tensor:
        return self.head(features)


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher()


def data(generator: torch.Generator, n: int = 20) -> list[Batch]:
    images = torch.rand(n, 1, 2, 2, generator=generator)
    labels = torch.randint(3, (n,), generator=generator)
    return [
        Batch(images[index], labels[index], index)
        for index in torch.randperm(n, generator=generator).split(6)
    ]


def build(teacher: Teacher, batches: list[Batch], **options: object) -> AnchorBank:
    return AnchorBank.build(
        teacher, batches, size=20, fingerprint=MADE_OF, show_progress=False, **options
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_the_teachers_features(
    teacher: Teacher, generator: torch.Generator, dtype: str
) -> None:
    batches = data(generator)
    bank = build(teacher, batches, dtype=dtype)
    teacher.eval()
    assert len(bank) == 20 and bank.features_MD.dtype == getattr(torch, dtype)
    for images, labels, index in batches:
        features = teacher.forward_features(images).detach()
        weights = teacher(images).softmax(1)[torch.arange(len(labels)), labels]
        rows = bank.rows(index)
        torch.testing.assert_close(rows.features_MD, features.to(rows.features_MD.dtype))
        torch.testing.assert_close(rows.weights_M, weights.detach())
        assert torch.equal(rows.labels_M, labels) and torch.equal(rows.index_M, index)
    assert bank.weights_M.dtype == torch.float32 and not bank.features_MD.is_inference()


def test_building_leaves_the_teacher_as_it_was(
    teacher: Teacher, generator: torch.Generator
) -> None:
    teacher.train()
    teacher.head.eval()
    build(teacher, data(generator))
    assert teacher.training and teacher.dropout.training and not teacher.head.training
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_rows_missing_or_twice_are_refused(teacher: Teacher, generator: torch.Generator) -> None:
    batches = data(generator)
    with pytest.raises(UserError, match="6 are missing, 0 came twice"):
        build(teacher, batches[1:])
    with pytest.raises(UserError, match="0 are missing, 6 came twice"):
        build(teacher, [*batches, batches[0]])


def test_without_labels_rows_stand_for_themselves(
    teacher: Teacher, generator: torch.Generator
) -> None:
    bank = build(teacher, data(generator), labelled=False)
    assert torch.equal(bank.all().labels_M, torch.arange(20))
    assert torch.equal(bank.rows(torch.tensor([7, 3])).labels_M, torch.tensor([7, 3]))
    assert bool((bank.weights_M == 1).all())
    with pytest.raises(UserError, match="labels"):
        bank.draw(3, generator, balanced=True)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_saved_bank_comes_back(
    teacher: Teacher, generator: torch.Generator, tmp_path: Path, labelled: bool
) -> None:
    bank = build(teacher, data(generator), labelled=labelled)
    bank.save(tmp_path / "bank.safetensors")
    loaded = AnchorBank.load(tmp_path / "bank.safetensors", expected=MADE_OF)
    assert torch.equal(loaded.features_MD, bank.features_MD)
    assert torch.equal(loaded.weights_M, bank.weights_M)
    assert torch.equal(loaded.all().labels_M, bank.all().labels_M)
    assert loaded.fingerprint == MADE_OF


@pytest.mark.parametrize("part", Fingerprint._fields)
def test_a_bank_of_something_else_is_refused_in_one_line(
    teacher: Teacher, generator: torch.Generator, tmp_path: Path, part: str
) -> None:
    build(teacher, data(generator)).save(tmp_path / "bank.safetensors")
    with pytest.raises(UserError, match=f"another {part} .*, not other") as error:
        AnchorBank.load(tmp_path / "bank.safetensors", expected=MADE_OF._replace(**{part: "other"}))
    assert "\n" not in str(error.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from gacd.storage import save_tensors

    save_tensors(tmp_path / "model.safetensors", {"weight": torch.ones(2)}, {})
    with pytest.raises(UserError, match="not an anchor bank"):
        AnchorBank.load(tmp_path / "model.safetensors")


def test_draws_are_uniform_or_balanced(generator: torch.Generator) -> None:
    """Counts of 40,000 draws within five standard deviations of their mean."""
    labels = torch.tensor([0] * 8 + [2] * 2)
    bank = AnchorBank(torch.ones(10, 1), labels, torch.ones(10), MADE_OF)
    for balanced, share in ((False, 0.2), (True, 0.5)):
        drawn = bank.draw(40_000, generator, balanced=balanced)
        twos = float((labels[drawn] == 2).float().mean())
        assert abs(twos - share) < 5 * (share * (1 - share) / 40_000) ** 0.5
        assert len(drawn.unique()) == 10


def test_draws_depend_on_the_generator_alone() -> None:
    bank = AnchorBank(torch.ones(99, 1), torch.arange(99) % 4, torch.ones(99), MADE_OF)
    for balanced in (False, True):
        first, again = (
            bank.draw(50, torch.Generator().manual_seed(3), balanced=balanced) for _ in range(2)
        )
        assert torch.equal(first, again)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_million_rows_are_drawn_from_in_constant_memory(
    tmp_path: Path, generator: torch.Generator
) -> None:
    """A sparse file of 10^7 rows, 1.4 GB: what a draw costs is what it draws."""

    def private_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    path, rows = tmp_path / "bank.safetensors", 10_000_000
    sizes = {"features": ("BF16", [rows, 64], 128), "labels": ("I64", [rows], 8)}
    sizes |= {"weights": ("F32", [rows], 4)}
    header: dict[str, object] = {"__metadata__": {"gacd": json.dumps(MADE_OF._asdict())}}
    offset = 0
    for name, (dtype, shape, width) in sizes.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [offset, offset + rows * width],
        }
        offset += rows * width
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)

    before = private_bytes()
    bank = AnchorBank.load(path, expected=MADE_OF)
    for _ in range(3):
        anchors = bank.rows(bank.draw(16_384, generator))
    assert len(bank) == rows and anchors.features_MD.shape == (16_384, 64)
    assert private_bytes() - before < 20 * 2**20


def test_true_class_probability_is_float32(generator: torch.Generator) -> None:
    logits = torch.randn(6, 3, generator=generator)
    labels = torch.randint(3, (6,), generator=generator)
    got = true_class_probability(logits.bfloat16(), labels)
    expected = -F.cross_entropy(logits.bfloat16().float(), labels, reduction="none")
    torch.testing.assert_close(got.log(), expected)


@pytest.mark.parametrize("rows", [300, 9000])  # more than are read at once
def test_principal_projection_is_pca(generator: torch.Generator, rows: int) -> None:
    from sklearn.decomposition import PCA

    mix = torch.randn(6, 6, generator=generator)
    scale = torch.linspace(2, 1, rows)[:, None]  # rows unlike those that come later
    features = scale * (torch.randn(rows, 6, generator=generator) @ mix) + 3
    weight, bias = principal_projection(features, 2)
    expected = torch.tensor(PCA(2).fit_transform(features.double().numpy())).float()
    got = F.linear(features, weight, bias)
    torch.testing.assert_close(got.abs(), expected.abs(), rtol=1e-3, atol=1e-3)
    for width in (0, 7):
        with pytest.raises(UserError, match="principal"):
            principal_projection(features, width)
