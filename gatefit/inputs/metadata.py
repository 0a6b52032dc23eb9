"""Labels of an image folder from a table beside the images, in the form of `datasets`' imagefolder.

A file `metadata.csv`, `metadata.jsonl` or `metadata.parquet` at the top of the folder or of a split has a column
`file_name`, relative to the file itself, and a column `label`:

    file_name,label
    0001.png,cat
    more/0002.png,dog
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gatefit.errors import DataError

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = ("file_name", "label")

Files = list[tuple[tuple[str, ...], Path]]
"""Images of a folder: the parts of each path below the folder, and the path."""


def with_labels(root: Path, files: Files, splits: Iterable[str]) -> Files:
    """Put each image that a table labels below a folder of its label's name, as if it lay there.

    Whole numbers get leading zeros, so that classes stand in the order of the numbers.

    Args:
        root: the image folder.
        files: its images.
        splits: names of folders that are splits, in lower case.

    Returns:
        The same images; unchanged where there is no table.

    Raises:
        DataError: a table cannot be read, has not both columns, or does not name an image that lies beside it.
    """
    tops = [root, *(p for p in sorted(root.iterdir()) if p.is_dir() and p.name.lower() in splits)]
    tables = {top: _read(file) for top in tops for file in (top / name for name in NAMES) if file.is_file()}
    if not tables:
        return files
    width = max((len(label) for table in tables.values() for label in table.values() if label.isdigit()), default=0)
    labelled: Files = []
    for _, path in files:
        top = next((t for t in reversed(tables) if t in path.parents), root)
        below = path.relative_to(top)
        label = tables.get(top, {}).get(below.as_posix())
        if label is None:
            raise DataError(f"the image '{path}' has no label in '{top}'; add it to {NAMES[0]}, or move it elsewhere")
        split = path.relative_to(root).parts[0]
        above = (split,) if len(path.relative_to(root).parts) > 1 and split.lower() in splits else ()
        labelled.append(((*above, label.zfill(width) if label.isdigit() else label, *below.parts), path))
    return labelled


def _read(file: Path) -> dict[str, str]:
    """Read a table: labels by file name."""
    try:
        rows = _rows(file)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"'{file}' cannot be read: {error}") from error
    for row in rows:
        missing = [column for column in COLUMNS if row.get(column) in (None, "")]
        if missing:
            raise DataError(f"'{file}' needs the columns file_name and label in each row; one has no {missing[0]}")
    labels: dict[str, str] = {}
    for row in rows:
        image, label = str(row["file_name"]), str(row["label"])
        if labels.setdefault(image, label) != label:
            raise DataError(f"'{file}' labels '{image}' both '{labels[image]}' and '{label}'; keep one row")
    return labels


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return list(csv.DictReader(stream))
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"'{file}' needs pyarrow to be read; pip install pyarrow, or write {NAMES[0]}") from None
    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows
