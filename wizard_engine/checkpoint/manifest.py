"""The manifest of a checkpoint: which files it has, which tensors they hold, and the checks against both."""

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wizard_engine.files import file_hash

NAME = "manifest.json"
FORMAT = "wizard-engine checkpoint 1"
GROUP_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def tensor_sum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes; it tells which tensor of a damaged file is hit."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else 0


def describe_tensor(tensor: Tensor) -> dict[str, Any]:
    """Manifest entry of a contiguous CPU tensor: shape, dtype, CRC-32."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "crc32": tensor_sum(tensor)}


def describe_group(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Manifest entry of a written file: name, bytes, SHA-256, and its tensors."""
    entries = {name: describe_tensor(tensor) for name, tensor in tensors.items()}
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_hash(path), "tensors": entries}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: the directory or its manifest is absent, or it is not a manifest of this format.
    """
    path = directory / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: expected the manifest of a checkpoint, got no file; {_ADVICE}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a manifest in JSON, got {error}; {_ADVICE}") from None
    fields = manifest.keys() if isinstance(manifest, dict) else ()
    if not {"format", "step", "state", "groups"} <= set(fields) or manifest["format"] != FORMAT:
        raise ValueError(f"{path}: expected a manifest of format {FORMAT!r}, got another; {_ADVICE}")
    return manifest


_ADVICE = "remove this checkpoint to continue from the one before it"


def read_group(directory: Path, group: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of one file, verified against its manifest entry.

    Raises:
        ValueError: the file is absent, cut, or damaged, or holds other tensors; names the file and a tensor.
    """
    path = directory / f"{group}.safetensors"
    expected: dict[str, dict] = entry["tensors"]
    listed = _names(expected)
    if not path.is_file():
        raise ValueError(f"{path}: missing; expected {listed}; {_ADVICE}")
    if path.stat().st_size < entry["bytes"]:
        cut = f"{path.stat().st_size} of {entry['bytes']} bytes"
        raise ValueError(f"{path}: truncated: got {cut}, lost {_lost(path, entry)}; {_ADVICE}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: corrupt ({error}); expected {listed}; {_ADVICE}") from None
    _check_tensors(path, tensors, expected)
    if file_hash(path) != entry["sha256"]:
        raise ValueError(f"{path}: corrupt: SHA-256 is not the manifest's; {_ADVICE}")
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, dict]) -> None:
    for name in sorted({*tensors, *expected}):
        if name not in tensors or name not in expected:
            state = "missing" if name in expected else "not in the manifest"
            raise ValueError(f"{path}: tensor {name}: {state}; {_ADVICE}")
        found, entry = describe_tensor(tensors[name]), expected[name]
        for key in ("shape", "dtype"):
            if found[key] != entry[key]:
                raise ValueError(f"{path}: tensor {name}: expected {key} {entry[key]}, got {found[key]}; {_ADVICE}")
        if found["crc32"] != entry["crc32"]:
            raise ValueError(f"{path}: tensor {name}: corrupt: its bytes are not those that were saved; {_ADVICE}")


def _names(names: Iterable[str]) -> str:
    """The first three tensor names, and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {', '.join(names[:3])}{more}" if names else "no tensors"


def _lost(path: Path, entry: Mapping[str, Any]) -> str:
    """Which tensors lie, whole or in part, behind the end of a cut file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    if len(header) < length or not header:
        return _names(entry["tensors"])
    present = path.stat().st_size - 8 - length
    try:
        places = json.loads(header)
        return _names(name for name in entry["tensors"] if places[name]["data_offsets"][1] > present)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return _names(entry["tensors"])
