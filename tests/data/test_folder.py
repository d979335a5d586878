import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gacd.data import folder
from gacd.data.folder import find_images, read_folder
from gacd.data.load import load_test
from gacd.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GACD_CACHE", str(cache))
    return cache


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (6, 6)) -> Image.Image:
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values)


def write(root: Path, counts: dict[str, int], mode: str = "RGB") -> Path:
    """PNG files root/PART/CLASS/NN.png, so that every pixel is known exactly."""
    seed = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(seed, mode).save(root / name / f"{number:02}.png")
            seed += 1
    return root


PARTS = {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 2}


def test_classes_order_labels_and_pixels(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", PARTS)
    (root / "train/cat/notes.txt").write_text("not an image")
    (root / "train/.hidden").mkdir()
    train, test = read_folder(root)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.name == "pets"
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1, 1]
    for row in range(5):
        expected = torch.from_numpy(np.array(picture(row))).permute(2, 0, 1)
        assert train.images[row].equal(expected)
    assert test.images[2, 0].equal(torch.from_numpy(np.array(picture(7)))[..., 0])


def test_grey_only_if_all_are_grey(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS, mode="L")
    train, test = read_folder(root)
    assert train.channels == test.channels == 1
    grey = train.images
    picture(50).save(root / "test/dog/50.png")
    train, test = read_folder(root)
    assert train.channels == test.channels == 3
    assert train.images.equal(grey.expand(-1, 3, -1, -1))


def test_other_sizes_are_scaled_and_centre_cropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path, PARTS)
    read_folder(root)
    assert "note" not in capsys.readouterr().out
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 3:9] = 200  # the middle is bright, the sides are cut off
    Image.fromarray(wide).save(root / "test/dog/99.png")
    _, test = read_folder(root)
    assert test.images.shape[-2:] == (6, 6)
    assert test.images[-1].eq(200).all()
    said = capsys.readouterr().out
    assert f"note: 1 of {sum(map(len, read_folder(root)))} images are scaled and cropped" in said
    capsys.readouterr()
    train, _ = read_folder(root, size=3)
    assert train.size == 3 and "note" not in capsys.readouterr().out  # it was asked for


def test_the_side_is_the_shorter_one_of_the_first_image(tmp_path: Path) -> None:
    for size in ((9, 6), (6, 9)):
        root = write(tmp_path / f"{size}", PARTS)
        picture(50, size=size).save(root / "train/cat/00.png")
        assert read_folder(root)[0].size == 6


def test_jpeg_palette_alpha_and_bilevel_images(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS)
    picture(1).save(root / "train/cat/10.JPEG")
    picture(2).quantize(8).save(root / "train/cat/11.gif", transparency=0)
    picture(3, "RGBA").save(root / "train/cat/12.png")
    Image.new("1", (6, 6), 1).save(root / "train/cat/13.png")
    train, _ = read_folder(root)
    assert len(train) == 9
    assert train.images[5].equal(
        torch.from_numpy(np.array(picture(3, "RGBA"))[..., :3]).permute(2, 0, 1)
    )
    assert train.images[6].eq(255).all()


def test_long_decoding_is_cached_and_a_changed_file_is_seen(
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = write(tmp_path, PARTS)
    read_folder(root)
    assert list(own_cache.iterdir()) == []  # decoded in no time: nothing is kept
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(folder, "_WORTH_CACHING", -1.0)
    fresh, _ = read_folder(root)
    (kept,) = own_cache.iterdir()
    assert capsys.readouterr().out == (
        f"note: the decoded images are kept in {kept} (0 MB; delete it at will)\n"
    )

    with monkeypatch.context() as context:
        context.setattr(folder, "_decode_all", lambda *_: pytest.fail("the cache was not read"))
        cached, _ = read_folder(root)
    assert cached.fingerprint() == fresh.fingerprint()
    assert capsys.readouterr().out == ""

    kept.write_bytes(kept.read_bytes()[:50])  # a damaged cache is made again
    assert read_folder(root)[0].fingerprint() == fresh.fingerprint()

    picture(77).save(root / "train/cat/00.png", compress_level=0)
    assert read_folder(root)[0].fingerprint() != fresh.fingerprint()


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise UserError("no space left on the disk")

    monkeypatch.setattr("gacd.storage.save_tensors", full)
    monkeypatch.setattr(folder, "_WORTH_CACHING", -1.0)
    root = write(tmp_path / "pets", PARTS)
    with pytest.warns(UserWarning, match="decoded anew each time: no space left"):
        train, _ = read_folder(root)
    assert len(train) == 5


def test_images_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS)
    with pytest.raises(UserError) as caught:
        read_folder(root, 10**8)
    assert str(caught.value) == (
        "8 images of 100000000 pixels a side are 240,000,000 GB, more than the memory has: "
        "lower --data.size, or say --data.stream true"
    )


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_folder(root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_folders_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refused(tmp_path / "nowhere")
    assert str(tmp_path / "train") in refused(tmp_path)
    write(tmp_path, {"train/cat": 1, "train/dog": 1})
    assert str(tmp_path / "test") in refused(tmp_path)
    (tmp_path / "test").mkdir()
    assert "no images" in refused(tmp_path)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS | {"train/eel": 0})
    assert str(root / "train/eel") in refused(root)


@pytest.mark.parametrize("part", [b"train/caf\xe9", b"train/cat/caf\xe9.png", b"test/cat/\xe9.txt"])
def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, part: bytes) -> None:
    """An archive from another system holds such names; Python keeps their bytes as surrogates."""
    root = write(tmp_path, PARTS)
    path = os.fsencode(root) + b"/" + part
    try:
        Path(os.fsdecode(path)).touch() if b"." in part else Path(os.fsdecode(path)).mkdir()
    except OSError:
        pytest.skip("a file system of UTF-8 names alone")
    message = refused(root)
    assert "\\xe9" in message and message.endswith("its name is not UTF-8; rename it")
    message.encode()


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    assert "at least two" in refused(write(tmp_path, {"train/cat": 2, "test/cat": 1}))


def test_a_mislabelled_test_class_is_named_with_its_nearest(tmp_path: Path) -> None:
    message = refused(write(tmp_path, PARTS | {"test/cats": 1}))
    assert "cats" in message
    assert "did you mean 'cat'" in message


def test_an_accent_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    """One letter, or a letter and its accent: a Mac's archives have the one, others the other."""
    one, two = "caf\u00e9", "cafe\u0301"
    counts = {f"train/{two}": 2, "train/cog": 2, f"test/{one}": 1, "test/cog": 2}
    root = write(tmp_path / "apart", counts)
    if {path.name for path in (root / "train").iterdir()} != {two, "cog"}:
        pytest.skip("a file system that writes them in one way itself")
    train, test = read_folder(root)
    assert train.classes == test.classes == (one, "cog")
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [0, 1, 1]
    (root / "test" / two).mkdir()
    assert refused(root) == (
        f"{root / 'test'}: two folders are '{one}', in two spellings of Unicode: join them"
    )


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS)
    path = root / "train/dog/90.jpg"
    picture(5, size=(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:700])
    assert str(path) in refused(root)


def test_all_files_that_are_no_images_are_named_at_once(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS)
    paths = sorted(path for path in (root / "train").rglob("*.png"))[1:4]
    for path in paths:
        path.write_text("none")
    message = refused(root)
    assert f"{paths[0]}: cannot be read as an image" in message
    assert f"(and 2 more: {paths[1]}, {paths[2]})" in message


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS)
    path = root / "train/cat/00.png"  # the first: its size is the default
    path.write_text("<html>404</html>")
    assert str(path) in refused(root)


def test_sixteen_bit_images_are_refused_rather_than_clipped(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS, mode="L")
    path = root / "train/cat/20.png"
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(path)
    message = refused(root)
    assert str(path) in message
    assert "8 bits" in message


def test_what_is_no_image_of_the_class_is_left_out_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path, {"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/dog": 1})
    before = read_folder(root, 8)[0]
    (root / "train" / "cat" / "._0.png").write_bytes(b"of another system")
    (root / "train" / "cat" / "folder.png").mkdir()
    (root / "train" / "dog" / "more.heic").write_bytes(b"of another kind")
    capsys.readouterr()
    after = read_folder(root, 8)[0]
    assert torch.equal(after.images, before.images)
    said = capsys.readouterr().out
    assert f"note: 2 things in the classes of {root / 'train'} are left out" in said
    (root / "train" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png: a link to a file that is not there"):
        read_folder(root, 8)
    (root / "train" / "dog" / "gone.png").unlink()
    (root / "train" / "dog" / "self.png").symlink_to("self.png")
    with pytest.raises(UserError, match=r"self\.png: a link to a file that is not there"):
        read_folder(root, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path, PARTS)
    _, expected, _ = find_images(root)
    os.mkfifo(root / "train/cat/pipe.png")
    assert find_images(root)[1] == expected
    kinds = ", ".join(sorted(folder.SUFFIXES))
    assert capsys.readouterr().out == (
        f"note: 1 things in the classes of {root / 'train'} are left out, such as "
        f"{root / 'train/cat/pipe.png'}: images are files directly in a class's folder, {kinds}\n"
    )


def test_two_folders_that_look_alike_are_two_in_the_cache(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_WORTH_CACHING", -1.0)
    for name, grey in (("black", 0), ("white", 255)):
        for part in ("train/a", "train/b", "test/a", "test/b"):
            path = tmp_path / name / part / "0.bmp"
            path.parent.mkdir(parents=True)
            Image.new("L", (8, 8), grey).save(path)
            os.utime(path, (1, 1))
    assert read_folder(tmp_path / "black")[0].images.max() == 0
    assert read_folder(tmp_path / "white")[0].images.min() == 255


def test_the_cache_is_of_one_size_and_of_the_files_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_WORTH_CACHING", -1.0)
    root = write(tmp_path, PARTS)
    assert [read_folder(root, size)[0].size for size in (6, 3, 6)] == [6, 3, 6]
    path = root / "train/cat/10.bmp"
    for grey in (0, 255):  # files of one length
        Image.new("RGB", (6, 6), (grey,) * 3).save(path)
        os.utime(path, (1 + grey, 1 + grey))
        assert read_folder(root, 6)[0].images[3].eq(grey).all()


def test_a_photograph_stands_upright(tmp_path: Path) -> None:
    root = write(tmp_path, PARTS)
    image = picture(5)
    lying, tag = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    tag[0x0112] = 6  # the camera's: turn it clockwise
    lying.save(root / "train/cat/00.png", exif=tag)
    assert np.array_equal(
        read_folder(root, 6)[0].images[0].permute(1, 2, 0).numpy(), np.asarray(image)
    )


def test_a_limit_asks_for_no_image_of_a_class_that_has_none(tmp_path: Path) -> None:
    """A network knows four classes, and test/ has two of them."""
    root = write(tmp_path / "pets", {"test/cat": 3, "test/dog": 3})
    found = load_test("folder", root=root, test_limit=2, known=("ant", "cat", "cow", "dog"))
    assert found.labels.tolist() == [1, 3] and found.num_classes == 4
