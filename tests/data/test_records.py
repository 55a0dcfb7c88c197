# SPDX-License-Identifier: Apache-2.0
"""Every kind of file gives the same records in any order and from threads; every damage is named with file and line."""

import gzip
import json
import os
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from few import MANY
from qwen2_jax.data.sources import records as module
from qwen2_jax.data.sources.records import open_records
from qwen2_jax.errors import UserError

RECORDS = [
    {"text": f"number {i} é 你好 \u2028 \U0001f600\r\n", "messages": [{"role": "user", "content": "x" * i}], "n": i}
    for i in range(60)
]


def lines(records=RECORDS):
    return "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(records)).encode()


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


def parquet(path: Path, records=RECORDS) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7)  # more groups than are kept in memory


def array_record(path: Path, records) -> None:
    writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def dataset(path: Path, records=RECORDS) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(records).save_to_disk(str(path))


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(lines()),
    "lines.json": lambda path: path.write_bytes(lines()),
    "array.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1), "utf-8"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines()[:3000]) + gzip.compress(lines()[3000:])),
    "a.jsonl.zst": lambda path: path.write_bytes(zst(lines()[:3000]) + zst(lines()[3000:])),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "a.parquet": parquet,
    "a.array_record": lambda path: array_record(path, lines().splitlines()),
    "dataset": dataset,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_any_record_in_any_order_from_any_thread(name, folder, tmp_path):
    records = open_records(str(folder / name), tmp_path / "cache")
    assert len(records) == len(RECORDS)
    assert list(records) == RECORDS  # ends with IndexError
    order = random.Random(0).choices(range(len(RECORDS)), k=300)
    assert [records[i] for i in order] == [RECORDS[i] for i in order]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(records.__getitem__, order)) == [RECORDS[i] for i in order]
    unit = "line" if "array.json" not in name and "json" in name else ""
    assert records.where(6).startswith(str(folder / name) + " ")
    assert records.where(6).endswith(f"{unit} 7")
    for i in (-1, len(RECORDS)):
        with pytest.raises(IndexError):
            records[i]


def test_fingerprint_follows_the_files(tmp_path):
    file = tmp_path / "data" / "a.jsonl"
    file.parent.mkdir()
    file.write_bytes(lines())
    take = lambda path: open_records(str(path), tmp_path / "cache").fingerprint
    first = take(file)
    assert take(file) == first == take(tmp_path / "data")
    os.utime(file, ns=(1, 1))
    second = take(file)
    os.rename(tmp_path / "data", tmp_path / "moved")  # the same files elsewhere are the same data
    assert take(tmp_path / "moved" / "a.jsonl") == second
    os.rename(tmp_path / "moved" / "a.jsonl", tmp_path / "moved" / "b.jsonl")
    assert len({first, second, take(tmp_path / "moved")}) == 3


def test_fingerprint_follows_a_folder_of_datasets(tmp_path, folder):
    import shutil

    shutil.copytree(folder / "dataset", tmp_path / "d")
    first = open_records(str(tmp_path / "d"), tmp_path).fingerprint
    (arrow,) = (tmp_path / "d").glob("*.arrow")
    os.utime(arrow, ns=(1, 1))
    assert open_records(str(tmp_path / "d"), tmp_path).fingerprint != first


def test_fingerprint_is_that_before_reading(tmp_path):
    """A file replaced while it is read must not count as read: the next start reads it again."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines())
    records = open_records(str(file), tmp_path)
    file.write_bytes(lines(RECORDS[:5]))
    assert len(records) == 5
    assert records.fingerprint != open_records(str(file), tmp_path).fingerprint


# Lines


@MANY
@given(st.lists(st.sampled_from(["", " ", "\t\r", '{"a": "b"}', ' {"a": 1}\r', '{"text": "\u2028 long enough"}'])))
def test_lines_are_found_whatever_stands_between_them(tmp_path_factory, parts):
    """Against plain splitting, in steps so small that lines lie across them."""
    want = [(number, json.loads(part)) for number, part in enumerate(parts, 1) if part.strip()]
    if not want:
        return
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    for mark, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"")):
        file.write_bytes(mark + "\n".join(parts).encode() + end)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "STEP", 5)
            records = open_records(str(file), file.parent)
        got = [(int(records.where(i).split(" line ")[1]), record) for i, record in enumerate(records)]
        assert got == want


def test_a_broken_line_is_shown(tmp_path):
    file = tmp_path / "mine.jsonl"
    good = [json.dumps({"text": str(i)}) for i in range(5)]
    file.write_text("\n".join([good[0], "", *good[1:], '{"text": "x" "more": 1}', good[0]]))
    records = open_records(str(file), tmp_path)
    assert records[4] == {"text": "4"}
    assert records[6] == {"text": "0"}
    with pytest.raises(UserError) as error:
        records[5]
    want = f"""{file} line 7: not valid JSON (Expecting ',' delimiter, column 14): '{{"text": "x" "more": 1}}'"""
    assert str(error.value) == want


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1]", ["[1] is not a JSON object"]),
        (b"7", ["7 is not a JSON object"]),
        (b'{"text": "caf\xe9"}', ["not valid UTF-8", "0xe9", "column 14"]),
        (b"{" + b"9" * 5000 + b"}", ["not valid JSON", "column 2"]),
        (b'{"n": ' + b"9" * 5000 + b"}", ["not valid JSON", "5000 digits"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b'{"text": "' + b"x" * 10_000, ["Unterminated string", "..."]),
        (b"\x00" * 50, ["not valid JSON"]),  # what a crash of the file system leaves behind
    ],
)
def test_lines_that_are_no_records(line, words, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    records = open_records(str(file), tmp_path)
    assert records[0] == {"text": "fine"}
    with pytest.raises(UserError) as error:
        records[1]
    assert str(error.value).startswith(f"{file} line 3: ")
    assert len(str(error.value)) < 400
    for word in words:
        assert word in str(error.value)


def test_an_array_is_checked_when_it_is_opened(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[\n {"text": "a"},\n {"text" "b"}\n]')
    with pytest.raises(UserError, match=r"a.json line 3: not valid JSON .*column 10.*'.*\"text\" \"b\"}'"):
        len(open_records(str(file), tmp_path))
    file.write_text('["\u2028",\n {"text" "b"}\n]', "utf-8")
    with pytest.raises(UserError, match=r"a.json line 2: not valid JSON .*'.*\"text\" \"b\"}'"):
        len(open_records(str(file), tmp_path))
    file.write_text('[{"text": "a"},\n')  # cut off
    with pytest.raises(UserError, match=r"a.json line 2: not valid JSON \(Expecting value, column 1\): ''"):
        len(open_records(str(file), tmp_path))
    file.write_text('[{"text": "a"}, 5]')
    with pytest.raises(UserError, match=r"a.json item 2: 5 is not a JSON object"):
        open_records(str(file), tmp_path)[1]


# Text


def test_texts_are_records_of_their_own(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    (folder / "sub" / "__init__.py").write_bytes(b"")
    (folder / "sub" / "a.py").write_bytes(b"x = 1\n")
    (folder / "c.md.gz").write_bytes(gzip.compress("é".encode()))
    (folder / "d.txt.zst").write_bytes(zst(b"zzz"))
    (folder / "picture.png").write_bytes(b"\x89")
    (folder / ".hidden" / "e.txt").write_bytes(b"no")
    records = open_records(str(folder), tmp_path / "cache")
    assert [record["text"] for record in records] == ["one\r\ntwo\n", "é", "zzz", "x = 1\n"]
    assert records.where(3) == str(folder / "sub" / "a.py")
    assert not (tmp_path / "cache").exists()
    (folder / "b.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(UserError, match=r"b\.txt line 2: not valid UTF-8 \(byte 0xff, column 5\)"):
        open_records(str(folder), tmp_path)[0]


# Which files


def test_a_folder_and_a_glob_are_their_files_sorted(tmp_path):
    folder = tmp_path / "shards"
    for name, part in (("b.jsonl", RECORDS[20:21]), ("a.jsonl", RECORDS[:20]), ("sub/c.jsonl", RECORDS[21:])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(part))
    for path, want in ((folder, RECORDS), (f"{folder}/**/*.jsonl", RECORDS), (f"{folder}/[ab].jsonl", RECORDS[:21])):
        records = open_records(str(path), tmp_path)
        assert list(records) == want
        assert records.where(20) == f"{folder / 'b.jsonl'} line 1"
    (folder / "odd[1].jsonl").write_bytes(lines(RECORDS[:2]))
    assert len(open_records(str(folder / "odd[1].jsonl"), tmp_path)) == 2


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "elsewhere/a.jsonl", lines(RECORDS[:3]))
    touch(tmp_path, "data/b.jsonl", lines(RECORDS[3:5]))
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "data")
    records = open_records(str(tmp_path / "data"), tmp_path)
    assert list(records) == [*RECORDS[3:5], *RECORDS[:3]]
    assert records.where(2) == f"{tmp_path / 'data' / 'link' / 'a.jsonl'} line 1"


def test_token_ids_are_no_records(tmp_path):
    touch(tmp_path, "data/a.jsonl", lines())
    for name in (module.META, module.TOKENS):
        touch(tmp_path, f"data/tokens/{name}", b'{"text": "not this"}')
    assert list(open_records(str(tmp_path / "data"), tmp_path)) == RECORDS
    with pytest.raises(UserError, match="tokens holds token ids.*; leave its format out"):
        open_records(str(tmp_path / "data" / "tokens"), tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "data[1]/a.jsonl", "data/b.JSON.gz", "data/set"])
def test_the_glob_suggested_for_mixed_kinds_works(name, tmp_path, monkeypatch):
    """A downloaded data set has a README.md beside its folder of data."""
    touch(tmp_path, "here/README.md", b"About")
    if name == "data/set":
        dataset(tmp_path / "here" / name)
    else:
        touch(tmp_path, f"here/{name}", gzip.compress(lines()) if name.endswith(".gz") else lines())
    monkeypatch.chdir(tmp_path / "here")
    for path in (str(tmp_path / "here"), f"{tmp_path / 'here'}/", ".", "*"):
        with pytest.raises(UserError, match="mixes kinds of files .*, such as '(.*)'") as error:
            open_records(path, tmp_path)
        suggested = re.search("such as '(.*)'", str(error.value))[1]
        assert list(open_records(suggested, tmp_path)) == RECORDS, suggested


def test_splits_of_datasets(tmp_path):
    dataset(tmp_path / "both" / "train", RECORDS[:3])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert list(open_records(str(tmp_path / "both"), tmp_path)) == RECORDS[:3]
    dataset(tmp_path / "both" / "test", RECORDS[3:5])
    assert list(open_records(str(tmp_path / "both" / "test"), tmp_path)) == RECORDS[3:5]
    for path in (tmp_path / "both", tmp_path):
        with pytest.raises(UserError, match="several splits \\(test, train\\); give the folder of one"):
            open_records(str(path), tmp_path)


def test_a_raw_text_array_record(tmp_path):
    array_record(tmp_path / "a.array_record", ["é".encode(), b'{"text": 1}', b"\xff"])
    records = open_records(str(tmp_path / "a.array_record"), tmp_path)
    assert [records[0], records[1]] == [{"text": "é"}, {"text": '{"text": 1}'}]
    with pytest.raises(UserError, match=r"a\.array_record record 3 line 1: not valid UTF-8"):
        records[2]
    array_record(tmp_path / "deep.array_record", [b"[" * 100_000])
    assert open_records(str(tmp_path / "deep.array_record"), tmp_path)[0] == {"text": "[" * 100_000}


def flip(data: bytes, start: int, stop: int) -> bytes:
    return data[:start] + bytes(255 - byte for byte in data[start:stop]) + data[stop:]


def touch(folder: Path, name: str, data: bytes = b"") -> str:
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(data)
    return str(folder / name)


def mixed(folder: Path) -> str:
    touch(folder, "a.jsonl", lines())
    touch(folder, "b.parquet", b"x")
    return str(folder)


DAMAGE = {
    "missing": (lambda to, good: str(to / "nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    "no match": (lambda to, good: str(to / "*.jsonl"), ["*.jsonl", "no such file"]),
    "remote": (lambda to, good: "gs://bucket/a.jsonl", ["gs://bucket/a.jsonl", "copy"]),
    "empty": (lambda to, good: touch(to, "a.jsonl"), ["a.jsonl is empty"]),
    "empty text": (lambda to, good: touch(to, "a.txt"), ["a.txt is empty"]),
    "empty parquet": (lambda to, good: touch(to, "a.parquet"), ["a.parquet is empty"]),
    "empty inside": (lambda to, good: touch(to, "a.jsonl.gz", gzip.compress(b"")), ["a.jsonl.gz is empty"]),
    "empty array": (lambda to, good: touch(to, "a.json", b" [] "), ["a.json is an empty list"]),
    "blank": (lambda to, good: touch(to, "a.jsonl", b"\n \n"), ["a.jsonl has only blank lines"]),
    "unknown": (lambda to, good: touch(to, "a.csv", b"x"), ["a.csv", "unknown kind", ".parquet"]),
    "parquet.gz": (lambda to, good: touch(to, "a.parquet.gz", b"x"), ["unknown kind"]),
    "nothing": (lambda to, good: str(Path(touch(to, "sub/a.csv", b"x")).parent), ["no data files", ".jsonl"]),
    "mixed": (lambda to, good: mixed(to), ["mixes kinds", "a.jsonl", "b.parquet", "/*.jsonl"]),
    "half a gz": (lambda to, good: touch(to, "a.jsonl.gz", good("a.jsonl.gz")[:-20]), ["a.jsonl.gz", "line 5"]),
    "bad gz": (lambda to, good: touch(to, "a.jsonl.gz", flip(good("a.jsonl.gz"), 30, 90)), ["a.jsonl.gz", "line 1"]),
    "no gz": (lambda to, good: touch(to, "a.jsonl.gz", lines()), ["a.jsonl.gz", "damaged", "line 1"]),
    "half a zst": (lambda to, good: touch(to, "a.jsonl.zst", good("a.jsonl.zst")[:-9]), ["a.jsonl.zst", "complete"]),
    "bad zst": (lambda to, good: touch(to, "a.jsonl.zst", flip(good("a.jsonl.zst"), 9, 99)), ["a.jsonl.zst", "line 1"]),
    "half text": (lambda to, good: touch(to, "a.txt.gz", good("a.jsonl.gz")[:-20]), ["a.txt.gz", "line 5"]),
    "half a parquet": (lambda to, good: touch(to, "a.parquet", good("a.parquet")[:-20]), ["a.parquet", "damaged"]),
    "bad parquet": (lambda to, good: touch(to, "a.parquet", flip(good("a.parquet"), 5, 60)), ["a.parquet", "damaged"]),
    "half an array_record": (
        lambda to, good: touch(to, "a.array_record", good("a.array_record")[:70_000]), ["a.array_record", "damaged"],
    ),
    "bad array_record": (
        lambda to, good: touch(to, "a.array_record", flip(good("a.array_record"), 150, 170)),
        ["a.array_record record 1", "damaged"],
    ),
    "half a dataset": (lambda to, good: str(Path(touch(to, "d/state.json", b"{")).parent), ["/d", "damaged"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case, tmp_path, folder):
    make, words = DAMAGE[case]
    path = make(tmp_path / "here", lambda name: (folder / name).read_bytes())
    with pytest.raises(UserError) as error:
        open_records(path, tmp_path / "cache")[0]
    for word in words:
        assert word in str(error.value)
    assert not list((tmp_path / "cache").glob("*.unfinished"))


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "dataset"])  # which opens no file of ours
def test_no_permission(name, folder, tmp_path, monkeypatch):
    """The system's refusal is imitated: root, as whom tests may run, is refused nothing."""
    import builtins

    real = builtins.open

    def refuse(file, *args, **kwargs):
        if str(file).startswith(str(folder)):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *args, **kwargs)

    if name == "a.parquet":
        monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(UserError, match=f"{name}: cannot be read \\(Permission denied\\)"):
        len(open_records(str(folder / name), tmp_path / "cache"))


def test_a_missing_library_is_named_with_the_remedy(folder, tmp_path, monkeypatch):
    import sys

    modules = {"zstandard": "a.jsonl.zst", "pyarrow.parquet": "a.parquet", "datasets": "dataset"}
    for name, file in (modules | {"array_record.python.array_record_module": "a.array_record"}).items():
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf'needs {name.split(".")[0]}: pip install "qwen2-jax\[data\]"'):
            len(open_records(str(folder / file), tmp_path / "cache"))


# The cache of decompressed files


def test_a_file_is_decompressed_once(tmp_path, folder):
    cache = tmp_path / "cache"
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(lines()))
    len(open_records(str(file), cache))
    (made,) = cache.iterdir()
    made.write_bytes(lines(RECORDS[:3]))  # what is there is taken
    assert len(open_records(str(file), cache)) == 3
    file.write_bytes(gzip.compress(lines(RECORDS[:5])))
    assert len(open_records(str(file), cache)) == 5  # the file has changed
    old, new = (touch(cache, f"{name}.unfinished", b"x") for name in ("old", "new"))
    os.utime(old, (time.time() - 7200,) * 2)
    len(open_records(str(folder / "a.jsonl.zst"), cache))
    assert not Path(old).exists()
    assert Path(new).exists()  # another process may be writing it


def test_a_cache_is_shared_by_hosts_and_users(tmp_path, folder, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(Path, "glob", lambda *_: iter([cache / "renamed since.unfinished"]))
    mask = os.umask(0o022)
    try:
        len(open_records(str(folder / "a.jsonl.gz"), cache))
    finally:
        os.umask(mask)
    (made,) = cache.iterdir()
    assert made.stat().st_mode & 0o777 == 0o644


def test_a_cache_that_cannot_be_written(tmp_path, folder):
    cache = touch(tmp_path, "file", b"in the way")
    with pytest.raises(UserError, match=r"file: cannot decompress .*a\.jsonl\.gz to there"):
        len(open_records(str(folder / "a.jsonl.gz"), Path(cache)))
