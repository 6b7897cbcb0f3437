"""The command that imports a GGUF file: what it prints, what it refuses, and that other recipes read the result."""

import errno
import re
import sys
from dataclasses import replace

import pytest

from recipes import export_hf, import_gguf
from tests.model.gguf_files import gguf, write_gguf
from wizard_engine.model import gguf_import as engine
from wizard_engine.model import load_model


@pytest.fixture
def cfg(tmp_path):
    if gguf is None:
        pytest.skip("the package gguf is absent")
    written = write_gguf(tmp_path / "a.gguf", kind="Q8_0")
    return import_gguf.Config(tmp_path / "models" / "a", gguf=written.path, dtype="bfloat16", max_shard_gb=2e-5)


def test_a_file_is_imported_and_other_recipes_read_it(cfg, tmp_path, capsys):
    out = import_gguf.main(cfg)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"done: {out}" and any("model.safetensors.index.json" in line for line in printed)
    exported = export_hf.main(export_hf.Config(out, tmp_path / "exported", quiet=True))
    ours, again = load_model(out), load_model(exported)
    assert ours[0].config == again[0].config and ours[1].fingerprint == again[1].fingerprint
    assert ours[1].chat_format.template == again[1].chat_format.template != ""


def test_a_directory_that_is_there_is_kept_until_it_is_replaced(cfg, monkeypatch):
    import_gguf.main(replace(cfg, quiet=True))
    before = {path.name: path.stat().st_ino for path in cfg.out.iterdir()}
    with pytest.raises(ValueError, match="a: expected no such directory, got one; choose another --out, or --ov"):
        import_gguf.main(cfg)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "write_parts", full)
        with pytest.raises(OSError, match=r"models/a: not written .*No space left.*; what was there is intact"):
            import_gguf.main(replace(cfg, overwrite=True))
    assert {path.name: path.stat().st_ino for path in cfg.out.iterdir()} == before
    assert [path.name for path in cfg.out.parent.iterdir()] == ["a"]
    import_gguf.main(replace(cfg, overwrite=True, max_shard_gb=5.0, quiet=True))
    assert (cfg.out / "model.safetensors").exists() and not list(cfg.out.glob("model-*"))


def test_one_source_is_needed(tmp_path):
    for options, got in (({}, "neither"), ({"gguf": tmp_path / "a", "package": "b"}, "both")):
        with pytest.raises(ValueError, match=f"gguf: expected --gguf or --package, got {got}"):
            import_gguf.main(import_gguf.Config(tmp_path / "out", **options))
    with pytest.raises(ValueError, match=r"package: expected an installed one, got no-such-package; pip install"):
        import_gguf.main(import_gguf.Config(tmp_path / "out", package="no-such-package"))


def test_the_extra_is_named_where_the_package_is_absent(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    named = re.escape("gguf: expected the package gguf, got no such package; pip install 'wizard-engine[gguf]'")
    with pytest.raises(ValueError, match=named):
        import_gguf.main(import_gguf.Config(tmp_path / "out", gguf=tmp_path / "a.gguf"))
