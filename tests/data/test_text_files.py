"""The one reader of files: marks, line ends and separators that editors bring, other containers, and raw bytes."""

import bz2
import gzip
import json
import lzma
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.data.records import read_prompts, read_rows, scan_rows
from wizard_engine.data.text_files import read_json, read_lines, read_objects, read_text
from wizard_engine.evaluation.answers import read_answers
from wizard_engine.evaluation.questions import read_questions

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
SEPARATORS = ("\n", "\r\n", "\r", "\u2028", "\u2029", "\x85", "\n\ufeff", " \n\t\n", "\r\r\n", "\n\u2028\n")
INNER = "a\u2028b\u2029c\x85d\ufeffe\x0bf\x1cg"


def record(number):
    return {"question": f"{number} {INNER}", "answer": "x"}


def encoded(text, encoding):
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(encoding, "")
    return (mark + text).encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
@pytest.mark.parametrize("end", ["", None])
def test_rows_are_the_same_whatever_marks_line_ends_and_separators_stand_between(tmp_path, encoding, separator, end):
    lines = [
        json.dumps(record(number), ensure_ascii=number % 2 == 1).replace("\\u000b", "\\u000b") for number in range(4)
    ]
    for name, text in (
        ("rows.jsonl", separator.join(lines) + (separator if end is None else "")),
        ("rows.json", "[" + ("," + separator).join(lines) + separator + "]" + (separator if end is None else "")),
    ):
        path = tmp_path / name
        path.write_bytes(encoded(text, encoding))
        assert [row.instruction for row in read_rows(path)] == [record(number)["question"] for number in range(4)]
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        rows = read_rows(tmp_path / f"{name}.gz")
        assert rows == read_rows(path) and rows[0].attributes == {"source": "rows"}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_errors_count_lines_by_lf_crlf_and_cr_alone(tmp_path, line_end, encoding):
    good = json.dumps(record(1), ensure_ascii=False)
    for text, line in (
        (line_end.join([good, "", good, "{broken", good]), 4),
        (line_end.join(["[", good + ",", "", '{"x": 1},', good, "]"]), 4),
        (line_end.join([good, good + " x"]), 2),
    ):
        (tmp_path / "rows.jsonl").write_bytes(encoded(text, encoding))
        with pytest.raises(ValueError, match=rf"rows\.jsonl:{line}: "):
            read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("length", [0, 1, 100_000, 3_000_000])
def test_huge_lines_and_objects_over_several_lines_are_read(tmp_path, length):
    path = tmp_path / "rows.json"
    value = {"question": "q" + "é" * length, "answer": "a"}
    for text in (json.dumps(value), json.dumps(value, indent=2), "\ufeff\n" + json.dumps(value, indent=4) + "\n\n"):
        path.write_text(text)
        assert [len(row.instruction) for row in read_rows(path)] == [length + 1]


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            '{"question": "a", "answer": "b", "question": "c"}',
            "expected each key of an object once, got 'question' twice",
        ),
        ('{"question": "a", "answer": "b", "n": 1e999}', "expected a number that a double can hold, got '1e999'"),
        ('{"question": "a", "answer": "b", "n": ' + "1" * 5000 + "}", "json: expected a number of at most 4300 digits"),
        ('{"question": "a", "answer": "b", "n": ' + "[" * 150 + "]" * 150 + "}", "at most 100 levels of brackets"),
        ('{"question": "a", "answer": "b"}{"question": "c", "answer": "d"}', "expected the end of the line"),
        ('{"question": "a\nb", "answer": "b"}', "expected a complete JSON value"),
    ],
)
def test_json_that_would_lose_or_change_something_is_refused(tmp_path, text, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: ") as caught:
        read_rows(path)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "data, reason",
    [
        (gzip.compress(b"{}" * 999, mtime=0)[:-9], "expected a whole gzip file"),
        (gzip.compress(b"{}", mtime=0)[:12] + b"garbage", "expected a whole gzip file"),
        (bz2.compress(b"{}"), "got a bzip2 file; decompress"),
        (lzma.compress(b"{}"), "got an xz file"),
        (b"PK\x03\x04....", "got a zip file"),
        (b"\x28\xb5\x2f\xfd....", "got a Zstandard file"),
        (b"\xff\xfea\x00b", "expected UTF-16, as its mark says, got truncated data at byte 5"),
        (b"\xff\xfe\n\x00\x00\xdc\n\x00", "2: file: expected UTF-16"),
    ],
)
def test_other_containers_and_broken_files_are_named(tmp_path, data, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    for read in (read_rows, read_prompts, read_text, read_objects):
        with pytest.raises(ValueError, match=r"rows\.jsonl:\d: file: ") as caught:
            read(path)
        assert reason in str(caught.value)


def test_folders_and_pipes_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="expected a regular file, got a folder or a pipe"):
            read_rows(path)


def test_text_and_lines_of_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff one\u2028still one \r\n\r\n\u2028\rtwo\x85\n\ufeffthree".encode("utf-16"))
    assert read_lines(path) == [(1, "one\u2028still one"), (4, "two"), (5, "three")]
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert read_text(path) == "a\nb\nc\n"
    path.write_bytes(b"a\r\nb\rc\xff")
    with pytest.raises(ValueError, match=r"prompts\.txt:3: text: expected UTF-8, got byte 0xff at byte 2"):
        read_text(path)


def test_read_json_names_the_line(tmp_path):
    path = tmp_path / "targets.json"
    path.write_bytes('\ufeff{\r\n\u2028"a": 1}\r\n'.encode())
    assert read_json(path) == {"a": 1}
    path.write_text('{\u2028"a": "b\u2028c\\"\xa0d"}')
    assert read_json(path) == {"a": 'b\u2028c"\xa0d'}
    for text, line in (('{"a":\r\n1,\r\n}', 3), ('{"a": 1}\n\nx', 1), ("", 1), ('{"a": 1, "a": 2}', 1)):
        path.write_text(text, newline="")
        with pytest.raises(ValueError, match=rf"targets\.json:{line}: json: "):
            read_json(path)


def test_parquet_rows_equal_those_of_json_lines(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    messages = [{"role": "user", "content": "a\u2028"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": messages, "n": 1.5, "question": None, "answer": None}]
    rows += [{"messages": None, "n": float("nan"), "question": "c", "answer": "d"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    first, second = read_rows(tmp_path / "train.parquet")
    assert first.messages[0].content == "a\u2028" and first.attributes == {"n": 1.5}
    assert second.attributes == {"source": f"{tmp_path.name}/train"}
    with pytest.raises(ValueError, match=r"train\.parquet:1: record: expected a preference row"):
        read_rows(tmp_path / "train.parquet", kind="preference")
    bad = [{"question": "a", "answer": b"\xff"}, {"question": "a", "answer": b"b"}]
    parquet.write_table(pyarrow.Table.from_pylist(bad), tmp_path / "bad.parquet")
    assert [row.answer for row in read_rows(tmp_path / "bad.parquet", on_error="skip")] == ["b"]
    data = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"train\.parquet:1: file: expected a readable Parquet file"):
        read_rows(tmp_path / "train.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet:1: file: expected pyarrow .*wizard-engine\[parquet\]"):
        read_rows(tmp_path / "a.parquet")


def test_questions_and_answers_go_through_the_one_reader(tmp_path):
    question = {"question_id": 1, "category": "math", "turns": ["a\u2028", "b"]}
    lines = [json.dumps(question, ensure_ascii=False), "broken", json.dumps({**question, "turns": ["a"]})]
    (tmp_path / "q.jsonl").write_bytes(
        "\u2028".join([lines[0]]).encode("utf-16") + "\r".join(["", *lines[1:]]).encode("utf-16-le")
    )
    with pytest.raises(ValueError, match=r"q\.jsonl:2: json: "):
        read_questions(tmp_path / "q.jsonl")
    (read,) = read_questions(tmp_path / "q.jsonl", on_error="skip")
    assert read.turns == ("a\u2028", "b")
    answers = [json.dumps({"id": key, "answer": f"{key}\x85"}, ensure_ascii=False) for key in "xy"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\u2029".join(answers).encode("utf-8-sig")))
    assert read_answers(tmp_path / "a.jsonl.gz", ["y", "x"], ["", ""]) == ["y\x85", "x\x85"]


MARKS = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PAR1", b"\xe2\x80\xa8", b"\xc2\x85", b"\x00"]
RECORDS = [
    json.dumps(record(1)).encode(),
    json.dumps([record(1)]).encode(),
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}',
    b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": [{"role": "user", "content": "a"}]}',
    b'{"turns": ["a", "b"], "question_id": 1, "category": "c"}',
    b'{"answer": "a", "id": "b"}',
]
SIGNS = [bytes([byte]) for byte in b'\n\r[]{},"'] + [b"null", b"\\ud800"]
FRAGMENTS = st.sampled_from([*MARKS, *RECORDS, *SIGNS])
READERS = (
    read_rows,
    lambda path: list(scan_rows(path, unknown_fields="count")),
    read_prompts,
    read_questions,
    lambda path: read_answers(path, ["b"], ["a"]),
    lambda path: read_objects(path),
    read_json,
    read_lines,
    read_text,
)


def check_readers(path, data):
    """Every reader of the bytes gives a value or a ValueError that names the file and a line of it."""
    path.write_bytes(data)
    for read in READERS:
        try:
            read(path)
        except ValueError as error:
            place = str(error).removeprefix(f"{path}:")
            assert place != str(error), error
            if ": expected an answer to every prompt" not in str(error) and ": expected 1 answers" not in str(error):
                assert place.split(":")[0].isdigit(), error


BYTES = st.lists(FRAGMENTS | st.binary(max_size=6), max_size=8).map(b"".join)


@settings(max_examples=50, deadline=None)
@given(data=BYTES)
def test_every_reader_of_any_bytes_names_file_and_line(tmp_path_factory, data):
    check_readers(tmp_path_factory.mktemp("bytes") / "rows.jsonl", data)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(data=BYTES)
def test_every_reader_of_many_bytes_names_file_and_line(tmp_path_factory, data):
    check_readers(tmp_path_factory.getbasetemp() / "rows.jsonl", data)
    check_readers(tmp_path_factory.getbasetemp() / "rows.jsonl", gzip.compress(data, mtime=0))


@pytest.mark.soak
def test_every_reader_of_bytes_for_twenty_minutes(tmp_path):
    """WIZARD_FUZZ_SECONDS sets another time; Parquet files are mutated where pyarrow is installed."""
    generator = random.Random(time.time_ns())
    seeds = [json.dumps(record(1)).encode(), *RECORDS, b"\n".join(RECORDS), b"[" + b",".join(RECORDS) + b"]"]
    seeds += [gzip.compress(seed, mtime=0) for seed in seeds] + [seed.decode().encode("utf-16") for seed in seeds]
    try:
        from pyarrow import Table, parquet

        parquet.write_table(
            Table.from_pylist([json.loads(seed) for seed in RECORDS if seed[:1] == b"{"]), tmp_path / "p"
        )
        seeds.append((tmp_path / "p").read_bytes())
    except ImportError:
        pass
    end, count = time.monotonic() + float(os.environ.get("WIZARD_FUZZ_SECONDS", "1200")), 0
    while time.monotonic() < end:
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randint(1, 6)):
            start = generator.randrange(len(data) + 1)
            piece = generator.choice([*MARKS, *SIGNS, generator.randbytes(3), bytes(data[: generator.randrange(40)])])
            data[start : start + generator.choice((0, 0, 1, 5, 200))] = piece
        check_readers(tmp_path / "rows.jsonl", bytes(data))
        count += 1
    print(f"{count} files")
