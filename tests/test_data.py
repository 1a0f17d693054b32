"""Reading, finding and downloading the data; every fault is one clear UserError."""

import contextlib
import gzip
import hashlib
import http.client
import io
import os
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, raising
from PIL import Image
from torchvision.datasets import FashionMNIST

import script_unet
from script_unet import UserError, find_data, load_fashion_mnist, read_idx

RAW = DATA / "FashionMNIST" / "raw"
FILES = {name: f"{part}-{kind}-ubyte.gz" for name, part, kind in (
    ("images", "train", "images-idx3"), ("labels", "train", "labels-idx1"),
    ("test images", "t10k", "images-idx3"), ("test labels", "t10k", "labels-idx1"))}
SYSTEM = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def raw(tmp_path):
    """A copy of the fixture's four files that a test may damage."""
    return Path(shutil.copytree(RAW, tmp_path / "raw"))


class Response(io.BytesIO):
    """What the stubbed urlopen answers: the file of that name in the mirror."""

    def __init__(self, request, mirror):
        self.url = request.full_url
        path = mirror / self.url.rsplit("/", 1)[1]
        if not path.exists():
            raise urllib.error.URLError("no such file")
        super().__init__(path.read_bytes())
        self.length = path.stat().st_size


@pytest.fixture
def places(monkeypatch, tmp_path):
    """(DATA_DIR's raw folder, SYSTEM_DATA_DIR), both still missing, beside a mirror, empty too."""
    data, system, mirror = (tmp_path / name for name in ("data", "system", "mirror"))
    mirror.mkdir()
    monkeypatch.setattr(script_unet, "DATA_DIR", str(data))
    monkeypatch.setattr(script_unet, "SYSTEM_DATA_DIR", str(system))
    monkeypatch.setattr(urllib.request, "urlopen", lambda request: Response(request, mirror))
    monkeypatch.setattr(FashionMNIST, "resources", [
        (path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in RAW.iterdir()])
    return data / "FashionMNIST" / "raw", system


def mirror_files(places):
    """Fill the mirror with the fixture's files; returns its folder."""
    return Path(shutil.copytree(RAW, places[1].with_name("mirror"), dirs_exist_ok=True))


def header(magic, *sizes):
    return b"".join(number.to_bytes(4, "big") for number in (magic, *sizes))


# Whole files

@pytest.mark.parametrize("split, count", [("train", 600), ("test", 200)])
def test_images_and_labels_are_those_of_the_files(split, count):
    images, labels = load_fashion_mnist(split, RAW)
    assert images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (count,) and labels.dtype == torch.int64
    name = {"train": "train", "test": "t10k"}[split]
    for tensor, file, start in ((images, "images-idx3", 16), (labels, "labels-idx1", 8)):
        data = gzip.decompress((RAW / f"{name}-{file}-ubyte.gz").read_bytes())[start:]
        assert bytes(tensor.flatten().tolist()) == data


@pytest.mark.parametrize("size", [16, 33, 64])
def test_other_image_sizes_are_resampled_as_pillow_does(monkeypatch, size):
    whole, labels = load_fashion_mnist("test", RAW)
    monkeypatch.setattr(script_unet, "IMG_SIZE", size)
    images, same_labels = load_fashion_mnist("test", RAW)
    assert images.shape == (200, 1, size, size) and images.dtype == torch.uint8
    assert torch.equal(labels, same_labels)
    by_pillow = [Image.fromarray(image[0].numpy()).resize((size, size), Image.BILINEAR)
                 for image in whole[:20]]
    difference = images[:20, 0].int() - torch.tensor(np.array(list(map(np.array, by_pillow))))
    assert abs(difference).max() <= 1 and abs(difference.float().mean()) < 0.03     # none cut off


def test_images_of_img_size_are_taken_as_they_are(monkeypatch, raw):
    small, labels = load_fashion_mnist("test", RAW)
    large = F.interpolate(small.float(), 33).byte()
    (raw / FILES["test images"]).write_bytes(gzip.compress(
        header(0x0803, 200, 33, 33) + large.numpy().tobytes()))
    with pytest.raises(UserError, match=r"200, 33, 33\), not .* 28 x 28 or \(set it\) IMG_SIZE=28"):
        load_fashion_mnist("test", raw)
    monkeypatch.setattr(script_unet, "IMG_SIZE", 33)
    images, same_labels = load_fashion_mnist("test", raw)
    assert torch.equal(images, large) and torch.equal(labels, same_labels)


def test_float_and_uint8_are_each_others_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    floats = script_unet.to_float(values)
    assert floats[0] == -1 and floats[-1] == 1
    assert torch.equal(script_unet.to_uint8(floats), values)
    assert script_unet.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="the full data set is not installed")
def test_full_data_set_has_its_published_counts_and_mean():
    for split, count in (("train", 60_000), ("test", 10_000)):
        images, labels = load_fashion_mnist(split, SYSTEM)
        assert images.shape == (count, 1, 28, 28)
        assert labels.bincount().tolist() == [count // 10] * 10
        if split == "train":
            assert images.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)


# Broken files

def truncated(data):
    return data[:len(data) // 2]


def flipped(data):
    return data[:100] + bytes([data[100] ^ 255]) + data[101:]


def shorter(data):
    return gzip.compress(gzip.decompress(data)[:-1])


def longer(data):
    return gzip.compress(gzip.decompress(data) + b"\0")


def replaced_header(*numbers):
    return lambda data: gzip.compress(
        header(*numbers) + gzip.decompress(data)[4 * len(numbers):])


BROKEN = [
    ("images", truncated, "gzip"), ("labels", truncated, "gzip"), ("images", flipped, "gzip"),
    ("images", gzip.decompress, "gzip"), ("test labels", lambda data: b"", "magic"),
    ("images", lambda data: b"<html>404 Not Found</html>", "gzip"),
    ("images", replaced_header(0x0D03), "magic"), ("test labels", replaced_header(0x0802), "magic"),
    ("labels", lambda data: gzip.compress(b""), "magic"),
    ("labels", lambda data: gzip.compress(header(0x0801)), "count"),
    ("images", shorter, "count"), ("images", longer, "count"), ("test labels", shorter, "count"),
    ("images", replaced_header(0x0803, 601), "count"),
    ("images", replaced_header(0x0803, 600, 14, 56), "28 x 28"),
    ("images", lambda data: (RAW / FILES["labels"]).read_bytes(), "28 x 28"),
    ("images", lambda data: gzip.compress(header(0x0803, 0, 28, 28)), "not 4"),
    ("images", lambda data: gzip.compress(header(0x0803, 3, 28, 28) + bytes(3 * 784)), "not 4"),
    ("labels", lambda data: (RAW / FILES["images"]).read_bytes(), "count"),
    ("labels", lambda data: (RAW / FILES["test labels"]).read_bytes(), "count"),
    ("labels", lambda data: gzip.compress(gzip.decompress(data)[:-1] + b"\12"),
     "below NUM_CLASSES=10")]


def test_file_that_cannot_be_read_is_not_only_to_be_deleted(raw):
    (raw / FILES["images"]).unlink()
    (raw / FILES["images"]).mkdir()     # as root may read whatever is a file
    with pytest.raises(UserError, match="images-idx3.* cannot be read.*directory.*Make it readabl"):
        load_fashion_mnist("train", raw)


@pytest.mark.parametrize("file, damage, reason", BROKEN)
def test_broken_file_is_named_with_reason_and_remedy(raw, file, damage, reason):
    path = raw / FILES[file]
    path.write_bytes(damage(path.read_bytes()))
    split = "test" if "test" in file else "train"
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        load_fashion_mnist(split, raw)
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert "download" in message and "apt-get install dataset-fashion-mnist" in message


def test_missing_file_is_named(raw):
    with pytest.raises(UserError, match="nowhere.gz"):
        read_idx(raw / "nowhere.gz")


# Where the data comes from

def test_data_dir_comes_before_the_system_and_the_system_before_the_download(places):
    own, system = places
    mirror_files(places)
    shutil.copytree(RAW, system)
    shutil.copytree(RAW, own)
    assert find_data() == own
    (own / FILES["test labels"]).unlink()       # not whole: the next place
    assert find_data() == system
    (system / FILES["images"]).unlink()
    assert find_data() == own                   # downloaded
    assert len(read_idx(own / FILES["test labels"])) == 200


def test_download_fills_data_dir_with_files_that_torchvision_finds_too(places, monkeypatch):
    mirror_files(places)
    sources, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, path: (
        sources.append(Path(source)), replace(source, path)))
    assert find_data() == places[0]
    data_dir = Path(script_unet.DATA_DIR)   # put aside below: no rename leads to another disk
    assert sources and all(places[0] in source.parents for source in sources)
    for path in RAW.iterdir():
        assert (places[0] / path.name).read_bytes() == path.read_bytes()
    assert len(FashionMNIST(data_dir, train=False, download=False)) == 200
    assert [path.name for path in data_dir.iterdir()] == ["FashionMNIST"]


def test_download_replaces_the_four_files_and_nothing_else(places):
    mirror_files(places)
    shutil.copytree(RAW, places[0])
    (places[0] / FILES["labels"]).unlink()
    mine = [places[0] / "notes", places[0].parent / "notes"]
    for path in mine:
        path.touch()
    (places[0] / FILES["images"]).write_bytes(b"old")
    assert find_data() == places[0] and all(path.exists() for path in mine)
    for path in RAW.iterdir():
        assert (places[0] / path.name).read_bytes() == path.read_bytes()
    # It may have been of other data; the others were the same
    assert [path.read_bytes() for path in places[0].glob("*.1")] == [b"old"]
    (places[0] / FILES["labels"]).unlink()
    find_data()
    assert (places[0] / f"{FILES['images']}.1").read_bytes() == b"old"      # not lost later


def test_second_run_downloads_nothing(places, monkeypatch):
    mirror_files(places)
    find_data()
    monkeypatch.setattr(urllib.request, "urlopen", None)
    assert find_data() == places[0]


def test_no_data_names_all_that_was_tried_and_both_remedies(places):
    with pytest.raises(UserError) as caught:
        find_data()
    message = str(caught.value)
    for part in (*places, "download", ".gz files", "apt-get install dataset-fashion-mnist"):
        assert str(part) in message


def test_download_that_breaks_off_is_a_download_that_failed(places, monkeypatch):
    monkeypatch.setattr(FashionMNIST, "download", raising(http.client.IncompleteRead(b"")))
    with pytest.raises(UserError, match="IncompleteRead.*gz files into.*apt-get install"):
        find_data()


def test_torchvision_that_cannot_be_imported_is_a_download_that_failed(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match="torchvision.*gz files into.*apt-get install dataset-fash"):
        find_data()


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink])
@pytest.mark.parametrize("file", ["images", "test labels"])
def test_broken_download_is_refused_and_made_good_by_the_next_run(places, file, damage):
    broken = mirror_files(places) / FILES[file]
    if damage is Path.unlink:
        broken.unlink()
    else:
        broken.write_bytes(damage(broken.read_bytes()))
    with pytest.raises(UserError, match="download"):
        find_data()
    assert not [path for path in Path(script_unet.DATA_DIR).rglob("*") if path.is_file()]
    mirror_files(places)
    assert find_data() == places[0]


def test_interrupted_download_is_made_good_by_the_next_run(places, monkeypatch):
    mirror_files(places)

    def half(self):
        Path(self.raw_folder).mkdir(parents=True)
        for name in FILES.values():
            Path(self.raw_folder, name).write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", lambda **options: (
            contextlib.nullcontext(tempfile.mkdtemp(**options))))   # kill -9 tidies nothing up
        patch.setattr(FashionMNIST, "download", half)
        with pytest.raises(KeyboardInterrupt):
            find_data()
    assert find_data() == places[0]
    for path in RAW.iterdir():
        assert (places[0] / path.name).read_bytes() == path.read_bytes()


def test_folder_that_may_not_be_searched_is_passed_over(places, monkeypatch):
    shutil.copytree(RAW, places[1])
    stat = os.stat

    def refuse(path, *args, **kwargs):      # root may search any folder
        if Path(path).parent == places[0]:
            raise PermissionError(13, "Permission denied")
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse)
    assert find_data() == places[1]


def test_data_dir_that_cannot_be_written_is_named(places, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(script_unet, "DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(UserError, match="DATA_DIR = .*file.*apt-get"):
        find_data()
