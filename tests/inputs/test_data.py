import tarfile

import pytest
import torch
from PIL import Image

from gatefit.errors import DataError, GatefitWarning
from gatefit.inputs.data import as_images, hold_out, normalise, read_data
from gatefit.inputs.models import InputSpec

SPEC = InputSpec((3, 16, 16))


def picture(seed=0, size=(16, 16)):
    torch.manual_seed(seed)
    return Image.frombytes("RGB", size, bytes(torch.randint(0, 256, (size[0] * size[1] * 3,)).tolist()))


def folder(root, splits=("train", "val"), classes=("cat", "dog"), count=3):
    seed = 0
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(seed).save(root / split / name / f"{i}.png")
                seed += 1
    return root


def test_an_image_folder(tmp_path):
    splits = read_data(str(folder(tmp_path)), SPEC)
    images, labels, index = splits.train.__getitems__([0, 5])
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 1] and index.tolist() == [0, 5]
    assert splits.train.classes == ("cat", "dog") and len(splits.test) == 6
    assert bytes(images[0].permute(1, 2, 0).flatten().tolist()) == picture(0).tobytes()


def test_a_tar_equals_the_folder(tmp_path):
    root = folder(tmp_path / "set")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(root, "set")
    plain, packed = read_data(str(root), SPEC), read_data(str(tmp_path / "set.tar"), SPEC)
    assert torch.equal(plain.train.resident, packed.train.resident)
    assert torch.equal(plain.test.labels, packed.test.labels)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as archive:
        archive.add(folder(tmp_path / "set"), "set")
    with pytest.raises(DataError, match="compressed"):
        read_data(str(tmp_path / "set.tgz"), SPEC)


def test_a_set_without_splits_is_divided_the_same_way_each_time(tmp_path):
    root = folder(tmp_path, splits=(".",), count=10)
    first, second = read_data(str(root), SPEC, seed=1), read_data(str(root), SPEC, seed=1)
    assert (len(first.train), len(first.test)) == (16, 4)
    assert torch.equal(first.test.resident, second.test.resident)
    assert not torch.equal(first.test.resident, read_data(str(root), SPEC, seed=2).test.resident)


def test_images_without_classes_have_no_labels(tmp_path):
    for i in range(5):
        picture(i).save(tmp_path / f"{i}.png")
    splits = read_data(str(tmp_path), SPEC)
    assert splits.train.labels is None and splits.train.__getitems__([0])[1].tolist() == [-1]


def test_resize_and_crop(tmp_path):
    picture(0, (40, 30)).save(tmp_path / "a.png")
    picture(1, (16, 50)).save(tmp_path / "b.png")
    assert read_data(str(tmp_path), SPEC).train.resident.shape[1:] == (3, 16, 16)


def test_corrupt_images_are_named_or_skipped(tmp_path):
    root = folder(tmp_path)
    (root / "train" / "cat" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"1\.png' cannot be read.*--skip-corrupt"):
        read_data(str(root), SPEC)
    with pytest.warns(GatefitWarning, match=r"read 11 images, skipped 1 \(1 corrupt\)"):
        splits = read_data(str(root), SPEC, corrupt="skip")
    assert len(splits.train) == 5 and splits.train.labels.tolist() == [0, 0, 1, 1, 1]


def test_missing_and_empty(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        read_data(str(tmp_path), SPEC)
    with pytest.raises(DataError, match="no folder or tar"):
        read_data(str(tmp_path / "none"), SPEC)
    with pytest.raises(DataError, match="no folder or tar 'photoz'"):
        read_data("photoz", SPEC)
    with pytest.raises(DataError, match="timm cannot create"):
        read_data("torch/nothing", SPEC)
    (tmp_path / "file.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="neither an image folder nor a readable tar"):
        read_data(str(tmp_path / "file.tar"), SPEC)


def test_half_a_folder(tmp_path):
    for i, splits in enumerate((("train", "other"), ("train",))):
        with pytest.raises(DataError, match="has train/ but no val/ or test/"):
            read_data(str(folder(tmp_path / str(i), splits=splits)), SPEC)


def test_classes_that_differ(tmp_path):
    root = folder(tmp_path)
    (root / "val" / "cat").rename(root / "val" / "bird")
    with pytest.raises(DataError, match=r"different classes \(bird, cat\)"):
        read_data(str(root), SPEC)


def test_digits_are_embedded():
    splits = read_data("digits", SPEC)
    assert (len(splits.train), len(splits.test), len(splits.train.classes)) == (1437, 360, 10)
    assert splits.train.resident.shape[1:] == (3, 16, 16)


def test_large_sets_are_decoded_on_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("gatefit.inputs.data.RESIDENT_BYTES", 0)
    root = folder(tmp_path)
    lazy = read_data(str(root), SPEC).train
    monkeypatch.undo()
    held = read_data(str(root), SPEC).train
    assert lazy.resident is None
    assert torch.equal(lazy.__getitems__([4, 1])[0], held.__getitems__([4, 1])[0])
    assert torch.equal(lazy.select(torch.tensor([3])).read(0), held.read(3))


def test_hold_out_is_a_partition():
    data = as_images((torch.arange(10).view(10, 1, 1, 1).float(), torch.zeros(10)), SPEC).train
    rest, held = hold_out(data, 3, seed=0)
    both = torch.cat([rest.resident, held.resident]).flatten().sort().values
    assert (len(rest), len(held)) == (7, 3) and both.tolist() == list(range(10))


def test_tensors_and_what_is_no_data():
    pair = (torch.zeros(4, 3, 16, 16), torch.tensor([0, 1, 2, 1]))
    images = as_images(pair, SPEC).test
    assert images.fits(3) and images.fits(10) and not images.fits(2) and not images.unlabelled().fits(3)
    with pytest.raises(DataError, match="do not fit each other"):
        as_images((pair[0], pair[1][:3]), SPEC)
    with pytest.raises(DataError, match="not int"):
        as_images(3, SPEC)


def test_normalise_bytes_but_not_floats():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert normalise(white, InputSpec((3, 2, 2), (0.5,) * 3, (0.5,) * 3)).unique().tolist() == [1]
    assert normalise(white.float(), SPEC).unique().tolist() == [255]


def test_a_stream_is_read_into_memory(monkeypatch):
    from timm.data.dataset import IterableImageDataset

    asked = []

    def create(name, split, **_options):
        asked.append(split)
        return IterableImageDataset("", reader=[(picture(i, (20, 18)), i % 3) for i in range(7)])

    monkeypatch.setattr("timm.data.create_dataset", create)
    splits = read_data("wds/some", SPEC)
    assert asked == ["train", "validation"] and len(splits.train) == len(splits.test) == 7
    assert splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and splits.train.fits(3)
    assert splits.train.resident.shape == (7, 3, 16, 16)
    assert len(read_data("wds/some", SPEC, limit=4).train) == 4
    monkeypatch.setattr("gatefit.inputs.data.RESIDENT_BYTES", 5 * 3 * 16 * 16)
    assert len(read_data("wds/some", SPEC, limit=5).train) == 5
    with pytest.raises(DataError, match=r"more than 5 images.*data\.limit"):
        read_data("wds/some", SPEC)
