"""Write a language model as a Hugging Face directory that transformers, vLLM and others load as it is.

    python recipes/export_hf.py --model runs/demo/slice_3/rleif/model --out exported --dtype bfloat16

Writes config.json, safetensors (in shards with an index where they are large), the tokenizer's files with the chat
template (Vicuna v1.1 with its exact system prompt, or the one that the model has or was trained in), and
generation_config.json with every EOS id.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from wizard_engine.data.sentencepiece_json import tokenizer_json
from wizard_engine.data.tokenizer import Tokenizer, load_tokenizer
from wizard_engine.model import Transformer, load_model, save_hf
from wizard_engine.model.published import special_ids
from wizard_engine.model.vocabulary import check_vocabulary
from wizard_engine.runtime.files import replace_directory, sync_tree, write_json
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import Checked, Positive


@dataclass(frozen=True)
class Config(Checked):
    """Export a language model."""

    model: Path
    """Model directory, of this project or of Hugging Face."""
    out: Path
    """Directory to write; it appears complete or not at all."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    tokenizer: Path | None = None
    """Tokenizer file or directory; default: the model directory's own."""
    max_shard_gb: Positive[float] = 5.0
    """Largest file of weights, 10^9 bytes; one tensor is never divided."""
    overwrite: bool = False
    """Replace a directory that is there."""
    quiet: bool = False


def companions(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Add the context's length to tokenizer_config.json, and write generation_config.json."""
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, fields | {"model_max_length": model.config.max_positions})
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        # Says why no tokenizer.json has the same ids.
        tokenizer_json((folder / "tokenizer.model").read_bytes())
    write_json(folder / "generation_config.json", special_ids(tokenizer) | {"do_sample": False})


def main(cfg: Config) -> Path:
    """Export; returns the directory."""
    if cfg.out.exists() and not cfg.overwrite:
        raise ValueError(f"{cfg.out}: expected no such directory, got one; choose another --out, or --overwrite")
    model, tokenizer = load_model(cfg.model, dtype=getattr(torch, cfg.dtype))
    if not isinstance(model, Transformer):
        raise ValueError(f"{cfg.model}: expected a language model, got a reward model")
    if cfg.tokenizer is not None:
        tokenizer = load_tokenizer(cfg.tokenizer)
        check_vocabulary(tokenizer, model.config, cfg.tokenizer)
    staged = cfg.out.with_name(f".{cfg.out.name}.export")
    try:
        save_hf(model, staged, tokenizer=tokenizer, max_shard_bytes=int(cfg.max_shard_gb * 10**9))
        companions(model, tokenizer, staged)
        sync_tree(staged)
        replace_directory(staged, cfg.out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if not cfg.quiet:
        for file in sorted(cfg.out.iterdir()):
            print(f"{file.stat().st_size:>14,} bytes  {file}")
        print(f"done: {cfg.out}")
    return cfg.out


if __name__ == "__main__":
    launch(main, Config)
