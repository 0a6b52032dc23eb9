"""Image folders and tars as people leave them: links, pipes, other formats, files in odd places."""

import io
import os
import tarfile
import warnings

import pytest
import torch
from PIL import Image

from gatefit.errors import DataError, GatefitWarning
from gatefit.inputs.data import read_data
from gatefit.inputs.models import InputSpec

SPEC = InputSpec((3, 8, 8))


def image(file, shade=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade,) * 3).save(file)
    return file


def set_of(root, splits=("train", "val"), classes=("cat", "dog"), count=2):
    for split in splits:
        for label in classes:
            for i in range(count):
                image(root / split / label / f"{i}.png")
    return root


def sizes(root, **options):
    """Read a folder without a warning, and count its images."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = read_data(str(root), SPEC, **options)
    return len(splits.train), len(splits.test)


@pytest.mark.parametrize("target", ["..", ".", "../val/dog", "dog"])
def test_a_link_to_images_that_are_read_anyway_is_refused(tmp_path, target):
    root = set_of(tmp_path / "photos")
    (root / "train" / "bird").symlink_to(target)
    with pytest.raises(DataError, match=r"the link '.*bird' leads to .*would count twice"):
        read_data(str(root), SPEC)


def test_a_link_inside_of_a_class_folder_is_refused(tmp_path):
    root = set_of(tmp_path / "photos")
    set_of(tmp_path / "other")
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="leads out of its class folder"):
        read_data(str(root), SPEC)


def test_a_link_to_a_file_that_is_read_anyway_is_refused(tmp_path):
    root = set_of(tmp_path / "photos")
    (root / "train" / "cat" / "9.png").symlink_to(root / "val" / "cat" / "0.png")
    with pytest.raises(DataError, match="would count twice"):
        read_data(str(root), SPEC)


def test_two_splits_cannot_be_links_to_one_folder(tmp_path):
    set_of(tmp_path / "other", splits=(".",))
    (tmp_path / "photos").mkdir()
    for split in ("train", "val"):
        (tmp_path / "photos" / split).symlink_to(tmp_path / "other")
    with pytest.raises(DataError, match="would count twice"):
        read_data(str(tmp_path / "photos"), SPEC)


def test_links_to_elsewhere_are_followed_down_to_the_classes(tmp_path):
    elsewhere = set_of(tmp_path / "disk")
    image(tmp_path / "blobs" / "x.png")
    root = tmp_path / "photos"
    (root / "val").mkdir(parents=True)
    (root / "train").symlink_to(elsewhere / "train")
    for label in ("cat", "dog"):
        (root / "val" / label).symlink_to(elsewhere / "val" / label)
    assert sizes(root) == (4, 4)
    (elsewhere / "train" / "cat" / "linked.png").symlink_to(tmp_path / "blobs" / "x.png")
    assert sizes(root) == (5, 4)


def test_a_link_that_leads_to_itself_or_nowhere_is_a_corrupt_image(tmp_path):
    root = set_of(tmp_path)
    (root / "train" / "cat" / "loop.png").symlink_to("loop.png")
    (root / "train" / "cat" / "gone.png").symlink_to("/nowhere.png")
    with pytest.raises(DataError, match="cannot be read"):
        read_data(str(root), SPEC)
    with pytest.warns(GatefitWarning, match="2 corrupt"):
        read_data(str(root), SPEC, "skip")


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_a_pipe_among_the_images_is_refused(tmp_path, monkeypatch, memory):
    monkeypatch.setattr("gatefit.inputs.data.RESIDENT_BYTES", memory)
    root = set_of(tmp_path)
    os.mkfifo(root / "train" / "cat" / "a.png")
    with pytest.raises(DataError, match=r"a\.png' cannot be read \(it is no regular file\)"):
        read_data(str(root), SPEC).train.read(2)


def test_files_that_are_not_read_are_counted(tmp_path):
    root = set_of(tmp_path)
    for name in ("a.heic", "b.HEIC", "c.gif", "d", "._0.png", "Thumbs.db", "notes.txt"):
        (root / "train" / "cat" / name).write_bytes(b"x")
    (root / "train" / "dog" / "0.png").write_bytes(b"x")
    image(root / "extra" / "0.png")
    wanted = r"read 7 images, skipped 7 \(2 \.heic, 1 corrupt, 1 hidden, 1 \.gif, 1 without extension, 1 outside train/"
    with pytest.warns(GatefitWarning, match=wanted):
        read_data(str(root), SPEC, "skip")


def test_hidden_folders_are_no_classes(tmp_path):
    root = set_of(tmp_path)
    image(root / "train" / ".ipynb_checkpoints" / "0.png")
    assert sizes(root) == (4, 4)


def test_a_class_without_images_is_refused(tmp_path):
    root = set_of(tmp_path)
    (root / "train" / "ant").mkdir()
    with pytest.raises(DataError, match=r"'ant' in train/ of '.*' holds no image"):
        read_data(str(root), SPEC)
    (root / "train" / "ant" / "a.heic").touch()
    with pytest.raises(DataError, match=r"'ant' in train/ of '.*' holds only 1 \.heic"):
        read_data(str(root), SPEC)


def test_a_set_of_other_files_says_which(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(DataError, match=r"holds no images .*1 \.heic"):
        read_data(str(tmp_path), SPEC)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_of_which_no_image_can_be_read_is_refused(tmp_path, split):
    root = set_of(tmp_path)
    for file in (root / split / "dog").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(DataError, match=f"no image of class 'dog' in {split}/"):
        read_data(str(root), SPEC, "skip")


@pytest.mark.parametrize("folder", [".", "train"])
def test_a_stray_image_beside_class_folders_is_refused(tmp_path, folder):
    root = set_of(tmp_path, splits=(".",) if folder == "." else ("train", "val"))
    image(root / folder / "stray.png")
    with pytest.raises(DataError, match=r"1 image \(stray\.png\) beside its class folders \(cat, dog\)"):
        read_data(str(root), SPEC)


def test_two_folders_for_one_split_are_refused(tmp_path):
    root = set_of(tmp_path, splits=("train", "TRAIN", "val"))
    with pytest.raises(DataError, match="TRAIN/ and train/, which are one split"):
        read_data(str(root), SPEC)


def test_a_test_split_beside_val_is_counted_as_not_read(tmp_path):
    root = set_of(tmp_path, splits=("train", "val", "test"))
    with pytest.warns(GatefitWarning, match=r"read 8 images, skipped 4 \(4 outside train/ and val/\)"):
        read_data(str(root), SPEC)


def add(archive, name, shade):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(stream, "PNG")
    member = tarfile.TarInfo(name)
    member.size = stream.tell()
    stream.seek(0)
    archive.addfile(member, stream)


def test_of_a_tar_member_that_is_there_twice_the_last_counts(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for split in ("train", "val"):
            for name, shade in ((f"{split}/cat/0.png", 1), (f"{split}/cat/1.png", 2), (f"./{split}/cat/0.png", 3)):
                add(archive, name, shade)
    images = read_data(str(tmp_path / "set.tar"), SPEC).train
    assert sorted(images.resident[:, 0, 0, 0].tolist()) == [2, 3]


def test_links_in_a_tar_are_counted(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for split in ("train", "val"):
            add(archive, f"{split}/cat/0.png", 1)
        link = tarfile.TarInfo("train/cat/1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "train/cat/0.png"
        archive.addfile(link)
    with pytest.warns(GatefitWarning, match=r"skipped 1 \(1 links\)"):
        read_data(str(tmp_path / "set.tar"), SPEC)


def test_a_table_that_labels_an_image_twice_is_refused(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,cat\na.png,dog\n")
    with pytest.raises(DataError, match="both 'cat' and 'dog'"):
        read_data(str(tmp_path), SPEC)


def test_sizes_are_read_in_the_order_of_the_names(tmp_path):
    """The order decides what a seed means: files of a folder first, then its folders."""
    for i, name in enumerate(("b.png", "a/z.png", "a.png", "c/a.png")):
        image(tmp_path / "train" / "cat" / name, i)
        image(tmp_path / "val" / "cat" / name, i)
    assert read_data(str(tmp_path), SPEC).train.resident[:, 0, 0, 0].tolist() == [2, 0, 1, 3]
    assert torch.equal(read_data(str(tmp_path), SPEC).train.labels, torch.zeros(4, dtype=torch.long))
