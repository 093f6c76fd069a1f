import gzip
import struct
import sys

import pytest
import torch

from gnsmon.demo.data import digits, read_idx, shifted, topics, windows

IMAGES, LABELS = 2051, 2049


def idx(magic, shape, content):
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(content)


def images(count, side=28):
    pixels = (torch.arange(count * side * side) % 251).tolist()
    return idx(IMAGES, (count, side, side), pixels)


def labels(count):
    return idx(LABELS, (count,), [i % 10 for i in range(count)])


@pytest.fixture
def folder(tmp_path):
    """MNIST in miniature: 12 training and 5 validation digits, the latter gzipped."""
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images(12))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels(12))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images(5)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels(5)))
    return tmp_path


def test_idx_files_are_read_back_plain_and_gzipped(folder):
    train, validation = digits(folder)
    assert train.tensors[0].shape == (12, 1, 28, 28)
    assert train.tensors[1].tolist() == [i % 10 for i in range(12)]
    assert validation.tensors[1].tolist() == [0, 1, 2, 3, 4]
    raw = read_idx(folder / "t10k-images-idx3-ubyte.gz", dims=3)
    assert raw.flatten().tolist() == list(images(5)[16:])


def test_training_images_are_standardised_and_validation_by_the_same_numbers(folder):
    train, validation = digits(folder)
    assert train.tensors[0].mean() == pytest.approx(0, abs=1e-5)
    assert train.tensors[0].std() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(validation.tensors[0], train.tensors[0][:5])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (images(12)[:-1], r"announces 12 x 28 x 28 = 9408 bytes, it holds 9407"),
        (images(12) + b"\0", r"it holds 9409"),
        (b"", r"magic number 2051; it begins with 0 and has 0 bytes"),
        (labels(12), r"magic number 2051; it begins with 2049"),
        (b"<!DOCTYPE html><html>not found</html>", r"magic number 2051; it begins with 1008813135"),
        (gzip.compress(images(12))[:-20], r"damaged gzip file"),
        (b"\x1f\x8b" + bytes(40), r"damaged gzip file"),
        (images(12, side=8), r"expected images of 28 x 28, got 8 x 8"),
        (images(0), r"expected a label for each of the 0 images"),
        (images(11), r"each of the 11 images of train-images-idx3-ubyte, got 12 labels"),
    ],
)
def test_a_bad_file_is_named_with_what_came(folder, content, expected):
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        digits(folder)
    assert str(error.value).startswith(str(folder / "train-"))


def test_labels_beyond_nine_are_refused(folder):
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(LABELS, (12,), [10] * 12))
    with pytest.raises(ValueError, match="expected labels 0 to 9, got 10"):
        digits(folder)


def test_a_missing_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte or .*\.gz, found neither"):
        digits(folder)


def test_bundled_digits_are_split_without_overlap_and_alike_every_time():
    pytest.importorskip("sklearn")
    train, validation = digits()
    assert (len(train), len(validation)) == (1438, 359)
    assert train.tensors[0].shape[1:] == (1, 28, 28)
    assert train.tensors[1].unique().tolist() == list(range(10))
    torch.testing.assert_close(digits()[0].tensors, train.tensors, rtol=0, atol=0)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "gnsmon\[demo\]"'):
        digits()


def test_shifts_move_each_image_by_itself_and_fill_with_the_background():
    torch.manual_seed(0)
    image = torch.zeros(28, 28)
    image[14, 14] = 1
    moved = shifted(image.expand(200, 1, 28, 28), 2)
    where = moved.nonzero()[:, 2:]
    assert len(where) == 200
    assert where.min() == 12 and where.max() == 16
    assert len(where.unique(dim=0)) == 25
    torch.testing.assert_close(shifted(moved, 0), moved, rtol=0, atol=0)


def test_topics_are_one_text_cut_in_two():
    text = topics()
    decoded = "".join(text.vocabulary[i] for i in text.train[:2000])
    assert "assert" in decoded and len(text.train) > 300_000
    assert len(text.train) == pytest.approx(9 * len(text.validation), rel=0.01)
    assert max(int(text.train.max()), int(text.validation.max())) < len(text.vocabulary)


def test_windows_are_followed_by_their_next_characters_and_repeat_with_the_seed():
    text = torch.arange(50)
    inputs, targets = next(windows(text, 200, 8, torch.Generator().manual_seed(1)))
    assert inputs.shape == targets.shape == (200, 8)
    assert torch.equal(targets, inputs + 1)
    assert inputs.min() == 0 and targets.max() == 49
    again, _ = next(windows(text, 200, 8, torch.Generator().manual_seed(1)))
    assert torch.equal(again, inputs)
