"""Atomic files, and the hashes by which content is recognised."""

import enum
import errno
import json
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest

from wizard_engine.runtime import files


def test_write_is_whole_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "deep" / "x.json"
    files.write_json(path, {"a": Path("b"), "n": 0.1, "é": (1, None)})
    assert json.loads(path.read_text("utf-8")) == {"a": "b", "n": 0.1, "é": [1, None]}
    files.write_text(path, "neu")
    files.write_bytes(path, b"\x00")
    assert path.read_bytes() == b"\x00" and os.listdir(path.parent) == ["x.json"]


def test_write_that_fails_keeps_the_former_file_and_names_the_path(tmp_path):
    path = tmp_path / "x"
    files.write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=str(path)) as caught:
            files.write_bytes(path, b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_write_that_cannot_take_its_place_keeps_the_former_file(tmp_path, monkeypatch):
    files.write_text(tmp_path / "x", "old")

    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="x: not written"):
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_write_json_of_something_else_changes_nothing(tmp_path):
    files.write_json(tmp_path / "x", [1])
    with pytest.raises(TypeError, match="got object"):
        files.write_json(tmp_path / "x", object())
    assert json.loads((tmp_path / "x").read_text()) == [1]


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Config:
    out: Path
    data: tuple[Path, ...] = ()
    model: str = "demo"
    lr: float = 0.1
    colour: Colour = Colour.RED
    quiet: bool = False
    overwrite: bool = False


def test_content_hash_ignores_key_order_and_nothing_else():
    assert files.content_hash({"a": 1, "b": [1, 2]}) == files.content_hash({"b": (1, 2), "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, ["a", 1], {"b": 1}, {"a": None}, {"a": True}]
    assert len({files.content_hash(value) for value in different}) == len(different)
    assert files.content_hash(Config(Path("x"))) == files.content_hash(files.to_plain(Config(Path("x"))))


def test_file_hash_of_a_directory_sees_names_and_contents(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "sub" / "f").write_text("1")
    seen = {files.file_hash(tmp_path / "a")}
    (tmp_path / "a" / "sub" / "f").write_text("2")
    seen.add(files.file_hash(tmp_path / "a"))
    (tmp_path / "a" / "sub" / "f").rename(tmp_path / "a" / "f")
    seen.add(files.file_hash(tmp_path / "a"))
    assert len(seen) == 3
    with pytest.raises(ValueError, match="nothing there"):
        files.file_hash(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="got a pipe or a device"):
        files.file_hash(tmp_path / "pipe")


# Catches: a rename that is on disk before what it names, so that a power cut leaves an empty file.
def test_file_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(descriptor):
        steps.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        fsync(descriptor)

    def watched_replace(first, second):
        steps.append("rename")
        replace(first, second)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    files.write_text(tmp_path / "x", "new")
    (temporary, size), rename, (folder, _) = steps
    assert temporary.startswith(f"{tmp_path}/.x.") and size == 3
    assert rename == "rename" and folder == str(tmp_path)


def test_write_json_lines_takes_values_one_after_another_and_replaces_the_file_at_the_end(tmp_path):
    path = tmp_path / "x" / "lines.jsonl"

    def values(last):
        yield {"text": "ein Ä"}
        assert not path.exists() or path.read_text(encoding="utf-8") == '{"text": "ein Ä"}\n[1, null]\n'
        yield last

    files.write_json_lines(path, values([1, None]))
    with pytest.raises(TypeError):
        files.write_json_lines(path, values(object()))
    assert path.read_text(encoding="utf-8") == '{"text": "ein Ä"}\n[1, null]\n'
    assert [entry.name for entry in path.parent.iterdir()] == ["lines.jsonl"]
