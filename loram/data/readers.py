"""Files into rows: jsonl, json, csv, tsv, parquet and txt, each row with its place in the file.

JSON and CSV are read here and not through pyarrow, so that an error names the file and the line, and
a CSV cell that looks like a number stays text.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loram.errors import DataError

Row = tuple[str, dict[str, Any]]
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin")


def read_rows(path: Path) -> list[Row]:
    """(place, row) for every row of one file; `place` is FILE:LINE or FILE row N."""
    suffix = suffix_of(path)
    if suffix in PICKLES:
        raise DataError(f"{path} is a pickle, which loram never opens; convert it to jsonl or parquet")
    if suffix not in READERS:
        raise DataError(f"{path} ends in {suffix or 'nothing'}; expected one of {', '.join(READERS)}")
    try:
        return list(READERS[suffix](path))
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def suffix_of(path: Path) -> str:
    """The ending that says the format; `.gz` is looked through."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def read_text(path: Path) -> str:
    """A whole file as text; DataError names the line and byte that is not UTF-8."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; "
            "save the file as UTF-8, e.g. with `iconv -f LATIN1 -t UTF-8`"
        ) from None


def json_lines(path: Path) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", as_object(parse_json(line, f"{path}:{number}"), f"{path}:{number}")


def json_file(path: Path) -> Iterator[Row]:
    """A JSON array of objects, an object that holds one such array, or JSON lines under another name."""
    text = read_text(path)
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from json_lines(path)
            return
        raise DataError(f"{path}:{error.lineno}: broken JSON ({error.msg}, column {error.colno})") from None
    if isinstance(body, dict):
        lists = [value for value in body.values() if isinstance(value, list)]
        body = lists[0] if len(lists) == 1 and len(body) == 1 else [body]
    if not isinstance(body, list):
        raise DataError(f"{path} holds a {type_name(body)}; expected an array of objects")
    for number, row in enumerate(body, start=1):
        yield f"{path} row {number}", as_object(row, f"{path} row {number}")


def parse_json(text: str, place: str) -> Any:
    """One JSON value, or DataError that names its place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: broken JSON ({error.msg}, column {error.colno}); mend or remove the line") from None


def as_object(value: Any, place: str) -> dict[str, Any]:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: a {type_name(value)}; expected an object with named columns")
    return value


def separated(path: Path, delimiter: str) -> Iterator[Row]:
    """CSV with a header line; every cell is text."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    header: list[str] = []
    try:
        for cells in reader:
            place = f"{path}:{reader.line_num}"
            if not header:
                header = [name.strip() for name in cells]
            elif len(cells) > len(header):
                raise DataError(f"{place}: {len(cells)} cells under {len(header)} column names; quote the separators")
            elif cells:
                yield place, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV ({error})") from None


def parquet(path: Path) -> Iterator[Row]:
    """A parquet table through pyarrow."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def documents(path: Path) -> Iterator[Row]:
    """Plain text: a document ends at a blank line."""
    lines: list[str] = []
    start = 1
    for number, line in enumerate([*read_text(path).split("\n"), ""], start=1):
        if line.strip():
            start = start if lines else number
            lines.append(line.rstrip("\r"))
        elif lines:
            yield f"{path}:{start}", {"text": "\n".join(lines)}
            lines = []


def type_name(value: Any) -> str:
    """A JSON value's type in plain words."""
    names = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".json": json_file,
    ".csv": lambda path: separated(path, ","),
    ".tsv": lambda path: separated(path, "\t"),
    ".parquet": parquet,
    ".txt": documents,
}
