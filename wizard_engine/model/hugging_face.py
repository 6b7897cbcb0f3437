"""Models on disk in the Hugging Face layout: config.json, safetensors in one file or in shards, tokenizer files."""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wizard_engine.data.chat_format import ChatFormat, recorded
from wizard_engine.data.tokenizer import Tokenizer, load_tokenizer
from wizard_engine.parallel import Sharded, sharded
from wizard_engine.parallel.shard_spec import ShardSpec
from wizard_engine.runtime.files import naming, replace_directory, restore_replaced, sync_tree, write_json
from wizard_engine.runtime.input_files import MAX_INDEX_BYTES, read_json_object, shown
from wizard_engine.runtime.metrics import byte_bar
from wizard_engine.runtime.object_collectives import first_error, from_main
from wizard_engine.runtime.process import Runtime

from .config import ModelConfig
from .heads import ScoringModel, scoring_head
from .published import Piece, Region, pieces, published_config, published_tensors, read_config
from .safetensors_file import DTYPES, NAMES, SafetensorsFile, file_header, write_file
from .transformer import Transformer
from .vocabulary import check_vocabulary

INTACT = "what was there is intact"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Tensors that older files carry and that follow from the configuration.
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
MAX_SHARD_BYTES = 5 * 10**9
MAX_OUTPUTS = 1024


class ModelDirectory:
    """A model directory whose configuration and headers have been read and checked; its tensors have not.

    A context manager. Everything that can be told without reading a tensor is told by the constructor: files, names,
    shapes, dtypes.

    Attributes:
        config, fields: ModelConfig, and config.json as it is.   outputs: of a scoring model, else None.
        shapes: parameter -> shape.
    Raises:
        ValueError: a file or a tensor is missing, broken, of another shape or dtype, or one that does not belong there;
            names file and tensor. Pickled weights are never read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config, self.fields = read_config(self.path)
        self.outputs: int | None = _outputs(self.path, self.fields)
        self._files: list[SafetensorsFile] = []
        try:
            self._where = self._open()
            # What config.json asks for is compared with the files' headers before anything is built of it.
            self._check_counts()
            self._pieces = {piece.name: piece for piece in self._expected()}
            self._take_aliases()
            self._check()
            self.shapes = {name: tuple(p.shape) for name, p in self.empty_model().named_parameters()}
            self._by_parameter: dict[str, list[Piece]] = {name: [] for name in self.shapes}
            for piece in self._pieces.values():
                self._by_parameter[piece.parameter].append(piece)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ModelDirectory":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @property
    def parameter_count(self) -> int:
        """The number of the model's parameters."""
        return sum(map(math.prod, self.shapes.values()))

    def close(self) -> None:
        """Let the memory maps go."""
        for file in self._files:
            file.__exit__()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far."""
        return sum(file.bytes_read for file in self._files)

    def empty_model(self) -> Transformer | ScoringModel:
        """The model on the meta device."""
        with torch.device("meta"):
            if self.outputs is None:
                return Transformer(self.config)
            return ScoringModel(self.config, self.outputs, surprise=self.fields.get("wizard_surprise", False))

    def _open(self) -> dict[str, SafetensorsFile]:
        """Tensor name -> file, of all files of the directory."""
        index = _read_index(self.path)
        where: dict[str, SafetensorsFile] = {}
        for name in sorted(set(index.values())) if index is not None else [SINGLE]:
            file = SafetensorsFile(self.path / name)
            self._files.append(file)
            for tensor in file.entries:
                if tensor in where:
                    raise ValueError(f"{file.path}: {tensor}: expected it once, found it in {where[tensor].path} too")
                if index is not None and index.get(tensor) != name:
                    got = index.get(tensor, "none")
                    raise ValueError(f"{self.path / INDEX}: {tensor}: expected the file {name} that has it, got {got}")
                where[tensor] = file
        for tensor, name in (index or {}).items():
            if tensor not in where:
                raise ValueError(f"{self.path / name}: expected the tensor {tensor} that {INDEX} names, found none")
        return where

    @property
    def _stacked(self) -> bool:
        """Whether the files have the experts of a layer in one tensor."""
        return any(name.endswith("mlp.experts.gate_up_proj") for name in self._where)

    def _check_counts(self) -> None:
        """Layers and experts take tensors each: there are no more of them than of those."""
        config, tensors = self.config, len(self._where)
        counts = {"num_hidden_layers": config.layers}
        if not self._stacked:
            counts["num_local_experts"] = config.layers * config.experts
        for name, count in counts.items():
            if count > tensors:
                got = self.fields.get(name)
                raise ValueError(
                    f"{self.path / 'config.json'}: {name}: expected no more than the {tensors} tensors of the weights "
                    f"have, got {got}"
                )

    def _expected(self) -> Iterator[Piece]:
        """What the files must hold: the layout of the experts is theirs."""
        yield from _body_pieces(self.config, "" if self.outputs is None else "body.", stacked=self._stacked)
        if self.outputs is None:
            return
        with torch.device("meta"):
            head = scoring_head(self.config.width, self.outputs, surprise=self.fields.get("wizard_surprise", False))
        yield from _score_pieces({f"score.{name}": tuple(p.shape) for name, p in head.named_parameters()})

    def _take_aliases(self) -> None:
        """Tensors that were saved under another name: the header says so, or the configuration ties the two."""
        for file in self._files:
            for name, other in file.aliases.items():
                if name in self._pieces:
                    self._take_alias(name, other, file)
        if self.config.tied and HEAD in self._where:
            self._take_alias(EMBEDDING, HEAD, self._where[HEAD])

    def _take_alias(self, name: str, other: str, file: SafetensorsFile) -> None:
        if name not in self._where:
            file.entries[name] = file.entries[other]
            self._where[name] = file

    def _check(self) -> None:
        missing = sorted(self._pieces.keys() - self._where.keys())
        if missing:
            raise ValueError(f"{self.path}: expected the tensor {missing[0]} (and {len(missing) - 1} more), found none")
        for name, file in self._where.items():
            piece, entry = self._pieces.get(name), file.entries[name]
            if piece is None:
                self._check_extra(name)
            elif entry.shape != piece.shape:
                raise ValueError(f"{file.path}: {name}: expected shape {piece.shape}, got {entry.shape}")
            elif entry.dtype not in DTYPES:
                raise ValueError(f"{file.path}: {name}: expected one of {', '.join(DTYPES)}, got {entry.dtype}")

    def _check_extra(self, name: str) -> None:
        """A tensor that the model has no place for must be known to say nothing of its own."""
        file = self._where[name]
        if HARMLESS.search(name):
            return
        if name == HEAD:
            other = self._where[EMBEDDING]
            is_alias = other is file and file.entries[name] is file.entries[EMBEDDING]
            if is_alias or file.equal(name, other, EMBEDDING):
                return
            raise ValueError(
                f"{file.path}: {name}: expected the embedding's numbers, for config.json ties the two, got others"
            )
        raise ValueError(f"{file.path}: {shown(name)}: expected a tensor of {self._kind}, got an unknown one")

    @property
    def _kind(self) -> str:
        return self.fields["architectures"][0]

    def parameters(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        slices: Mapping[str, Region] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """This engine's parameters by name, one at a time; only the bytes that they need are read.

        Args:
            slices: parameter name -> the box of it that is wanted, slices with step 1 of each dim (as a rank keeps it);
                parameters without one are left out. None: all of them, whole.
        Raises:
            ValueError: an unknown name, or a box outside the parameter.
        """
        regions = {name: tuple(slice(0, n) for n in shape) for name, shape in self.shapes.items()}
        if slices is not None:
            regions = {name: _checked_box(name, region, self.shapes) for name, region in slices.items()}
        for name, region in regions.items():
            out = torch.empty([b.stop - b.start for b in region], dtype=dtype, device=device)
            for piece in self._by_parameter[name]:
                self._fill(out, region, piece)
            yield name, out

    def read(self, name: str, start: int, out: Tensor, *, spec: ShardSpec | None = None) -> None:
        """Copy elements of a parameter, from `start` on in row-major order, into `out` (n,) of any dtype and device.

        Args:
            cut: count in what is left of the parameter by it; None: in all of it.
        Raises:
            ValueError: an unknown parameter, or elements outside it.
        """
        shape = self.shapes.get(name)
        spec = ShardSpec.whole(shape or ()) if spec is None else spec
        size = spec.height * spec.width
        if shape is None or spec.shape != shape or not 0 <= start <= start + out.numel() <= size:
            raise ValueError(f"{name}: expected elements of a parameter, got {start} to {start + out.numel()}")
        for tile in spec.slices(start, start + out.numel()):
            if tile.columns == shape[-1] or tile.rows == 1:
                self._read_run(name, tile.row * shape[-1] + tile.column, tile.of(out).view(-1))
                continue
            inside = slice(tile.row, tile.row + tile.rows), slice(tile.column, tile.column + tile.columns)
            for piece in self._by_parameter[name]:
                self._fill(tile.of(out), inside, piece)

    def _read_run(self, name: str, start: int, out: Tensor) -> None:
        """Elements of a whole parameter that stand together."""
        for piece in self._by_parameter[name]:
            first = piece.start_in(self.shapes[name])
            low, high = max(start, first), min(start + out.numel(), first + math.prod(piece.shape))
            if low < high:
                self._where[piece.name].copy_elements(piece.name, low - first, out[low - start : high - start])

    def _fill(self, out: Tensor, region: Region, piece: Piece) -> None:
        """Copy what a published tensor has of a box of its parameter."""
        common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region, piece.region)]
        if any(c.start >= c.stop for c in common):
            return
        target = out[tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, region))]
        inside = [slice(c.start - p.start, c.stop - p.start) for c, p in zip(common, piece.region)]
        # A tensor of one expert has no dim for the experts.
        extra = len(inside) - len(piece.shape)
        source = tuple(inside[extra:])
        self._where[piece.name].copy(piece.name, source, target[(0,) * extra])


def _checked_box(name: str, region: Region, shapes: Mapping[str, tuple[int, ...]]) -> Region:
    if name not in shapes:
        raise ValueError(f"slices: expected names of parameters, got {name}")
    shape = shapes[name]
    fits = len(region) == len(shape) and all(
        b.step in (None, 1) and 0 <= (b.start or 0) <= (n if b.stop is None else b.stop) <= n
        for b, n in zip(region, shape)
    )
    if not fits:
        raise ValueError(f"slices: {name}: expected a box inside {shape}, got {region}")
    return tuple(slice(b.start or 0, n if b.stop is None else b.stop) for b, n in zip(region, shape))


def _outputs(path: Path, fields: Mapping[str, Any]) -> int | None:
    """Outputs of a scoring model; None of a language model."""
    outputs, surprise = fields.get("wizard_outputs"), fields.get("wizard_surprise", False)
    if outputs is not None and (type(outputs) is not int or not 1 <= outputs <= MAX_OUTPUTS):
        expected = f"1 to {MAX_OUTPUTS}"
        raise ValueError(f"{path / 'config.json'}: wizard_outputs: expected {expected}, got {shown(outputs)}")
    if not isinstance(surprise, bool):
        raise ValueError(f"{path / 'config.json'}: wizard_surprise: expected true or false, got {shown(surprise)}")
    return outputs


def _read_index(path: Path) -> dict[str, str] | None:
    """Tensor name -> file name of a sharded directory; None where there is one file."""
    index = path / INDEX
    if not index.exists():
        if not (path / SINGLE).exists():
            raise ValueError(
                f"{path / SINGLE}: expected safetensors weights, found none; pickled weights are never read"
            )
        return None
    weight_map = _weight_map(index)
    for tensor, name in weight_map.items():
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: expected file names inside the directory, got {shown(name)} for {shown(tensor)}"
            )
    return weight_map


def _weight_map(index: Path) -> dict[str, str]:
    try:
        fields = read_json_object(index, MAX_INDEX_BYTES)
    except ValueError as error:
        got = str(error).removeprefix(f"{index}: ")
        raise ValueError(f"{index}: expected a JSON object with weight_map, got: {got}") from None
    weight_map = (fields or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: expected a JSON object with weight_map of file names, got {shown(weight_map)}")
    return weight_map


def load_hf(path: Path | str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Transformer:
    """The language model of a Hugging Face directory (Mistral, Llama, Mixtral), without its tokenizer.

    Parameters are filled one at a time from memory-mapped files, so that host memory stays within one tensor of the
    model's own size. Both layouts of Mixtral's experts are read.

    Args:
        dtype: of the parameters, whatever that of the files.   device: where they go.
    Raises:
        ValueError: see `ModelDirectory`; nothing is loaded half. Or the directory holds a scoring model.
    """
    with ModelDirectory(path) as directory:
        if directory.outputs is not None:
            raise ValueError(f"{path}: expected a language model, got a scoring model with {directory.outputs} outputs")
        model = _materialised(directory, dtype, device)
    assert isinstance(model, Transformer)
    return model


def load_model(
    path: Path | str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer | ScoringModel, Tokenizer]:
    """Model and tokenizer of a directory that `save_model` (or transformers) wrote; a scoring model where it holds one.

    Raises:
        ValueError: as `load_hf`, or the tokenizer is missing or broken.
    """
    with ModelDirectory(path) as directory:
        tokenizer = load_tokenizer(Path(path))
        check_vocabulary(tokenizer, directory.config, path)
        model = _materialised(directory, dtype, device)
    return model, tokenizer


def _materialised(directory: ModelDirectory, dtype: torch.dtype, device: Any) -> Transformer | ScoringModel:
    """The directory's model with every parameter read; scoring heads stay in fp32, where they compute."""
    model = directory.empty_model()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    total = directory.parameter_count * dtype.itemsize
    with byte_bar(f"load {directory.path}", total) as bar:
        for name, tensor in directory.parameters(dtype=dtype, device=device):
            owner, _, leaf = name.rpartition(".")
            wide = tensor.float() if name.startswith("score.") else tensor
            setattr(model.get_submodule(owner), leaf, nn.Parameter(wide, requires_grad=trained[name]))
            bar.update(tensor.nbytes)
    return model


def save_hf(
    model: Transformer,
    path: Path | str,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a directory that transformers and others read: Mixtral (classic layout), Mistral or Llama; returns path.

    It appears by one rename, complete or not at all. Beside the model one tensor is in memory at a time.

    Args:
        tokenizer: saved beside the weights, its BOS and EOS named in config.json.   extra: further fields of that.
        max_shard_bytes: where the weights take more, they are divided into files of at most so much (or one tensor).
    Raises:
        ValueError: parameters of several dtypes, or of one that the format has no name for.
        OSError: not written; what was at `path` is intact.
    """
    tensors = published_tensors(model)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= NAMES.keys():
        got = sorted(map(str, dtypes))
        raise ValueError(f"model: expected parameters of one dtype of {', '.join(NAMES.values())}, got {got}")
    fields = _fields(model, tokenizer, dtypes.pop(), extra)
    return _write(tensors, fields, tokenizer, Path(path), max_shard_bytes)


def _say_chat_format(directory: Path, chat_format: ChatFormat) -> None:
    """Write the chat format into tokenizer_config.json, and whether the model was trained in it."""
    path = directory / "tokenizer_config.json"
    write_json(path, recorded(json.loads(path.read_text(encoding="utf-8")), chat_format))


def save_model(
    model: Transformer | ScoringModel, tokenizer: Tokenizer, path: Path | str, *, extra: dict | None = None
) -> Path:
    """`save_hf` with a tokenizer, of a language model or a scoring model (adds `score.*` tensors, `wizard_outputs`)."""
    if not isinstance(model, ScoringModel):
        return save_hf(model, path, tokenizer=tokenizer, extra=extra)
    tensors = published_tensors(model.body)
    tensors |= {f"score.{name}": parameter for name, parameter in model.score.named_parameters()}
    fields = _fields(model, tokenizer, model.body.embedding.weight.dtype, extra)
    return _write(tensors, fields, tokenizer, Path(path), MAX_SHARD_BYTES)


def _fields(
    model: Transformer | ScoringModel, tokenizer: Tokenizer | None, dtype: torch.dtype, extra: Mapping | None
) -> dict[str, Any]:
    """config.json of a model whose body is in a dtype."""
    name = str(dtype).removeprefix("torch.")
    fields = published_config(model.config, tokenizer, dtype=name) | dict(extra or {})
    if isinstance(model, ScoringModel):
        fields |= {"wizard_outputs": model.outputs, "wizard_surprise": model.surprise}
    return fields


def _pieces_of(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    """Published tensors of a language model or a scoring model with these parameters."""
    yield from _body_pieces(config, "" if "embedding.weight" in shapes else "body.")
    yield from _score_pieces({name: shape for name, shape in shapes.items() if name.startswith("score.")})


def _body_pieces(config: ModelConfig, prefix: str, *, stacked: bool = False) -> Iterator[Piece]:
    """Published tensors of a language model whose parameters have a prefix."""
    for piece in pieces(config, stacked=stacked):
        yield Piece(piece.name, piece.shape, prefix + piece.parameter, piece.region)


def _score_pieces(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Piece]:
    """Tensors of a scoring head, published under their own names."""
    for name, shape in shapes.items():
        yield Piece(name, shape, name, tuple(slice(0, n) for n in shape))


def save_sharded(
    model: Transformer | ScoringModel,
    path: Path | str,
    runtime: Runtime,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """`save_model` of a model that is divided over ranks: each of them writes its ranges of every file, nothing is
    gathered. Every rank makes the call; they share a file system.

    Raises:
        ValueError, OSError: on every rank, what failed on one; what was at `path` is intact.
    """
    engine, path = sharded(model), Path(path)
    dtypes = {slot.name: flat.dtype for flat in engine.flats for slot in flat.layout.slots}
    listed = list(_pieces_of(model.config, engine.shapes))
    specs = {piece.name: (dtypes[piece.parameter], piece.shape) for piece in listed}
    fields = _fields(model, tokenizer, dtypes[listed[0].parameter], extra)
    files, index = weight_files(specs, max_shard_bytes)
    headers = {file: file_header({name: specs[name] for name in names}) for file, names in files.items()}
    partial = path.with_name(f".{path.name}.partial")

    def begin() -> None:
        restore_replaced(path.parent)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file, (text, _, size) in headers.items():
            with naming(path / file, INTACT), open(partial / file, "xb") as out:
                out.write(text)
                out.truncate(size)
        if index is not None:
            write_json(partial / INDEX, index)
        if tokenizer is not None:
            tokenizer.save(partial)
            _say_chat_format(partial, tokenizer.chat_format)
        write_json(partial / "config.json", fields)

    from_main(runtime, begin)
    error: Exception | None = None
    try:
        if engine.mesh.replicate.index == 0:
            _write_ranges(engine, listed, files, headers, partial)
    except OSError as caught:
        error = OSError(f"{path}: not saved ({caught}); {INTACT}")
    text = first_error(error, runtime)
    if text:
        from_main(runtime, lambda: shutil.rmtree(partial, ignore_errors=True))
        raise OSError(text)
    from_main(runtime, lambda: _put_in_place(partial, path))
    return path


def _write_ranges(
    engine: Sharded, listed: list[Piece], files: Mapping[str, list[str]], headers: Mapping[str, tuple], folder: Path
) -> None:
    """This rank's elements of every published tensor, at their places in the files."""
    by_parameter: dict[str, list[Piece]] = {}
    for piece in listed:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    file_of = {name: file for file, names in files.items() for name in names}
    opened = {file: os.open(folder / file, os.O_WRONLY) for file in files}
    try:
        with byte_bar(f"save {folder.parent}", sum(flat.weights.nbytes for flat in engine.flats)) as bar:
            for name, start, values in engine.weight_shards(exact=False):
                shard = values.detach().cpu().contiguous()
                for first, offset, count in engine.shard_specs[name].runs(start, start + shard.numel()):
                    for piece in by_parameter[name]:
                        begin = piece.start_in(engine.shapes[name])
                        low, high = max(first, begin), min(first + count, begin + math.prod(piece.shape))
                        if low < high:
                            at = headers[file_of[piece.name]][1][piece.name] + (low - begin) * shard.element_size()
                            part = shard[offset + low - first : offset + high - first]
                            _write_at(opened[file_of[piece.name]], part, at, folder / file_of[piece.name])
                bar.update(shard.nbytes)
        for descriptor in opened.values():
            os.fsync(descriptor)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _write_at(descriptor: int, values: Tensor, at: int, path: Path) -> None:
    """Write values at a place of a file; an OSError names it."""
    data = memoryview(values.view(torch.uint8).numpy())
    try:
        while data:
            written = os.pwrite(descriptor, data, at)
            data, at = data[written:], at + written
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(
    tensors: dict[str, Tensor], fields: dict, tokenizer: Tokenizer | None, path: Path, max_shard_bytes: int
) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    restore_replaced(path.parent)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(tensors, partial, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(partial)
            _say_chat_format(partial, tokenizer.chat_format)
        write_json(partial / "config.json", fields)
        _put_in_place(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"{path}: not saved ({error}); {INTACT}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    files, index = weight_files({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, max_shard_bytes)
    with byte_bar(f"save {folder.parent}", sum(tensor.nbytes for tensor in tensors.values())) as bar:
        for file, names in files.items():
            write_file(folder / file, {name: tensors[name] for name in names}, written=bar.update)
    if index is not None:
        write_json(folder / INDEX, index)


def weight_files(specs: Mapping[str, tuple], most: int) -> tuple[dict[str, list[str]], dict | None]:
    """File -> names in order, a new file where the next tensor would make one larger than `most` bytes; the index."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor_bytes in sizes.items():
        if shards[-1] and size + tensor_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}, None
    files = {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}
    weight_map = {name: file for file, names in files.items() for name in names}
    return files, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def _put_in_place(partial: Path, path: Path) -> None:
    """Give a directory its name once every byte of it is on disk."""
    sync_tree(partial)
    replace_directory(partial, path)
