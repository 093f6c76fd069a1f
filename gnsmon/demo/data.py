"""Two data sets that need no download: handwritten digits, and the text of Python's own manual."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def digits(data_dir: Path | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation digits: images [N, 1, 28, 28] of unit variance, labels [N].

    Without `data_dir`, scikit-learn's 1797 bundled 8x8 digits scaled up, every fifth one kept for
    validation. With it, the MNIST files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and
    the `t10k` pair for validation, each with or without `.gz`.

    Raises:
        FileNotFoundError: a file is not in `data_dir`.
        ValueError: a file is truncated or not what its name says.
        ImportError: without `data_dir` and without scikit-learn.
    """
    if data_dir is None:
        images, labels = _bundled_digits()
        held_out = torch.arange(len(labels)) % 5 == 4
        train, validation = (
            (images[~held_out], labels[~held_out]),
            (
                images[held_out],
                labels[held_out],
            ),
        )
    else:
        train, validation = _mnist(data_dir, "train"), _mnist(data_dir, "t10k")
    mean, std = train[0].mean(), train[0].std()
    return (
        TensorDataset((train[0] - mean) / std, train[1]),
        TensorDataset((validation[0] - mean) / std, validation[1]),
    )


def shifted(images: Tensor, pixels: int) -> Tensor:  # [B, C, H, W]
    """Each image moved by up to `pixels` along both axes, drawn from torch's generator."""
    rows, columns = torch.randint(2 * pixels + 1, (2, len(images)))
    height, width = images.shape[2:]
    padded = F.pad(images, [pixels] * 4, value=float(images.min()))
    views = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, shifts, shifts, H, W]
    return views[torch.arange(len(images)), :, rows, columns]


@dataclass(frozen=True)
class Text:
    """A text as character indices, its last tenth kept for validation."""

    vocabulary: str
    train: Tensor  # [characters]
    validation: Tensor  # [characters]


def topics() -> Text:
    """The help topics of the running Python (`pydoc_data.topics`), about 450 000 characters."""
    try:
        from pydoc_data.topics import topics as pages
    except ImportError as error:
        raise ImportError(
            "the text task reads pydoc_data.topics of the standard library, which this Python "
            "was installed without; run the digits task instead"
        ) from error
    text = "\n\n".join(pages[name] for name in sorted(pages))
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    encoded = torch.tensor([index[character] for character in text])
    cut = len(encoded) * 9 // 10
    return Text(vocabulary, encoded[:cut], encoded[cut:])


def windows(
    text: Tensor, batch_size: int, context: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random windows and of the characters that follow, both [B, context]."""
    while True:
        start = torch.randint(len(text) - context, (batch_size, 1), generator=generator)
        window = text[start + torch.arange(context + 1)]  # [B, context + 1]
        yield window[:, :-1], window[:, 1:]


def read_idx(path: Path, dims: int) -> Tensor:
    """The unsigned bytes of an idx file of `dims` dimensions, plain or gzipped.

    Raises:
        ValueError: another magic number, or more or fewer bytes than the header announces.
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    magic, found = 0x0800 + dims, int.from_bytes(content[:4], "big")
    header = 4 + 4 * dims
    if len(content) < header or found != magic:
        raise ValueError(
            f"{path}: expected an idx file of unsigned bytes in {dims} dimension(s), "
            f"magic number {magic}; it begins with {found} and has {len(content)} bytes"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path}: its header announces {' x '.join(map(str, shape))} = {math.prod(shape)} "
            f"bytes, it holds {len(content) - header}; fetch it again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].view(shape)


def _mnist(data_dir: Path, part: str) -> tuple[Tensor, Tensor]:
    image_file, label_file = (
        _find(data_dir, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
    )
    images, labels = read_idx(image_file, dims=3), read_idx(label_file, dims=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(
            f"{image_file}: expected images of 28 x 28, got {images.shape[1]} x {images.shape[2]}"
        )
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"{label_file}: expected a label for each of the {len(images)} images of "
            f"{image_file.name}, got {len(labels)} labels"
        )
    if labels.max() > 9:
        raise ValueError(f"{label_file}: expected labels 0 to 9, got {int(labels.max())}")
    return images[:, None].float() / 255, labels.long()


def _find(data_dir: Path, name: str) -> Path:
    for path in (data_dir / name, data_dir / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{data_dir}: expected a file {name} or {name}.gz, found neither")


def _bundled_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the digits task reads scikit-learn\'s digits: pip install "gnsmon[demo]"; '
            "or name a folder with the MNIST files as data_dir"
        ) from error
    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float()[:, None] / 16  # [N, 1, 8, 8]
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(bundled.target).long()
