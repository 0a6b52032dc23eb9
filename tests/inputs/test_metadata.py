import json

import pytest
from PIL import Image

from gatefit.errors import DataError
from gatefit.inputs.data import read_data
from gatefit.inputs.models import InputSpec

SPEC = InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def image(file, shade):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade,) * 3).save(file)


def write(file, rows):
    if file.suffix == ".csv":
        file.write_text("file_name,label\n" + "".join(f"{n},{label}\n" for n, label in rows))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps({"file_name": n, "label": label}) + "\n" for n, label in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = {"file_name": [n for n, _ in rows], "label": [label for _, label in rows]}
        parquet.write_table(pyarrow.table(table), file)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("at_root", [False, True])
def test_a_table_gives_the_labels(tmp_path, kind, at_root):
    rows = []
    for split in ("train", "test"):
        mine = [(f"more/{i}.png", ("dog", "cat")[i % 2]) for i in range(4)]
        for i, (name, _) in enumerate(mine):
            image(tmp_path / split / name, 10 * i)
        if not at_root:
            write(tmp_path / split / f"metadata.{kind}", mine)
        rows += [(f"{split}/{name}", label) for name, label in mine]
    if at_root:
        write(tmp_path / f"metadata.{kind}", rows)
    splits = read_data(str(tmp_path), SPEC)
    assert splits.train.classes == ("cat", "dog")
    pixels, labels, _ = splits.train.__getitems__(range(4))
    shades = {int(x[0, 0, 0]): splits.train.classes[int(label)] for x, label in zip(pixels, labels, strict=True)}
    assert shades == {0: "dog", 10: "cat", 20: "dog", 30: "cat"}


def test_numbers_stand_in_their_order(tmp_path):
    rows = [(f"{i}.png", i) for i in range(12)]
    for name, i in rows:
        image(tmp_path / name, i)
    write(tmp_path / "metadata.csv", rows)
    splits = read_data(str(tmp_path), SPEC)
    pixels, labels, _ = splits.train.__getitems__(range(len(splits.train)))
    assert pixels[:, 0, 0, 0].tolist() == labels.tolist() and splits.train.classes[2] == "02"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\na.png,x\n", "has no label in"),
        ("file_name,kind\na.png,x\nb.png,x\n", "one has no label"),
        ("file_name,label\na.png,\nb.png,x\n", "one has no label"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, text, message):
    for name in ("a.png", "b.png"):
        image(tmp_path / name, 0)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_data(str(tmp_path), SPEC)
