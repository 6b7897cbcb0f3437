"""Serve a checkpoint to any OpenAI client: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    python recipes/serve.py --model DIR --port 8000
    torchrun --nproc-per-node 2 recipes/serve.py --model DIR --tp 2

The server listens on 127.0.0.1 unless --host names another address. If WIZARD_API_KEY is set, clients must send that
key. Without a key, pages of a browser are refused unless --allow-origin names them. On SIGTERM or SIGINT the server
stops accepting requests and finishes those in flight. /openapi.json describes the API.
"""

import contextlib
import gc
import hashlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from wizard_engine import runtime
from wizard_engine.data.chat import use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.tokenizer import Tokenizer, load_tokenizer
from wizard_engine.generation.allowed_ids import allowed_ids
from wizard_engine.generation.engine import Engine, cache_bytes
from wizard_engine.model import ModelDirectory, Transformer
from wizard_engine.model.loading import weights_dtype
from wizard_engine.model.vocabulary import check_vocabulary
from wizard_engine.parallel import MeshOptions, make_mesh
from wizard_engine.rl.sampler import empty_sampler
from wizard_engine.rl.weight_sync import checksum
from wizard_engine.runtime.launch import launch
from wizard_engine.runtime.ranges import Checked, Count, NonNegative, Positive, ranged
from wizard_engine.serving.driver import Driver, follow

KEY = "WIZARD_API_KEY"

Port = ranged(0, 65535)


@dataclass(frozen=True)
class Config(Checked):
    """Serve a checkpoint with the HTTP API of OpenAI."""

    model: Path
    """Model directory of this project or of Hugging Face (Mistral, Llama, Mixtral)."""
    port: Port[int] = 8000
    """TCP port; 0 chooses a free one, which the first line of the log names."""
    host: str = "127.0.0.1"
    """Address to listen on; with 0.0.0.0 other machines can connect, so set a key."""
    chat_format: ChatFormatChoice = "auto"
    """auto is the directory's own chat template, Vicuna v1.1 where it has none; or vicuna, chatml, or a .jinja file."""
    name: str | None = None
    """Name of the model for clients; default: the directory's name."""
    tp: Count[int] = 1
    """Tensor-parallel ranks of torchrun: matrices and experts are sharded over them."""
    cache_gib: Positive[float | None] = None
    """Memory of keys and values, GiB per rank; default: nine tenths of a GPU's free memory, or 2 GiB on a CPU."""
    max_sequences: Count[int] = 64
    """Most sequences in one decode step."""
    max_queue: NonNegative[int] = 256
    """Most waiting sequences; further requests are refused with status 429."""
    max_new_tokens: Count[int] = 1024
    """Longest answer, tokens; also the default of chat requests."""
    max_choices: Count[int] = 64
    """Choices (n, times prompts) of one request."""
    max_body_mib: Positive[float] = 4.0
    """Largest request body, MiB."""
    head_seconds: Positive[float] = 10.0
    """Longest wait for the headers of a request."""
    read_seconds: Positive[float] = 30.0
    """Longest wait for the body of a request."""
    write_seconds: Positive[float] = 30.0
    """Longest wait for a client to read a chunk of its answer."""
    drain_seconds: NonNegative[float] = 30.0
    """Time for running answers to finish after SIGTERM."""
    max_connections: Count[int] = 1024
    """Most requests at once; as many connections may wait without a complete request, then the oldest is closed."""
    allow_host: tuple[str, ...] = ()
    """Names in the Host header that are accepted beside this machine's own, without a key."""
    allow_origin: tuple[str, ...] = ()
    """Origins of browser pages that may call (CORS), such as https://example.org; * for all."""
    allow_content_type: tuple[str, ...] = ()
    """Content types of bodies that are accepted beside application/json, without a key."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"


def main(cfg: Config) -> None:
    """Load the model and serve until told to stop."""
    try:
        import uvicorn

        from wizard_engine.serving.admission import BACKLOG
        from wizard_engine.serving.connections import ConnectionPool, HttpServer
        from wizard_engine.serving.guard import access_of
        from wizard_engine.serving.server import Limits, Server, checked_key
    except ImportError as error:
        raise ValueError(f"serve: expected starlette and uvicorn, got {error}; pip install -e '.[serve]'") from None
    api_key = os.environ.get(KEY)
    if api_key is not None:
        checked_key(api_key)
    rt = runtime.start(cfg.device)
    if rt.world_size != cfg.tp:
        raise ValueError(f"tp: expected the {rt.world_size} ranks of this run, got {cfg.tp}")
    # Before the model is read, which may take minutes.
    listening = _listening(cfg) if rt.is_main else None
    tokenizer = use_chat_format(load_tokenizer(cfg.model), cfg.chat_format)
    engine, mesh, fingerprint = _engine(cfg, tokenizer, rt)
    if not rt.is_main:
        # The first rank says when to end, once its answers have.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        follow(engine, mesh.tp)
        runtime.stop()
        return
    check_vocabulary(tokenizer, engine.config, cfg.model)
    use_chat_format(tokenizer, vocab_size=engine.config.vocab_size)
    driver = Driver(engine, tokenizer, max_jobs=cfg.max_sequences + cfg.max_queue, axis=mesh.tp)
    limits = Limits(
        min(cfg.max_new_tokens, engine.scheduler.max_length),
        cfg.max_choices,
        int(cfg.max_body_mib * 2**20),
        cfg.read_seconds,
        cfg.write_seconds,
    )
    name = cfg.name or cfg.model.resolve().name
    access = access_of(
        cfg.host,
        has_key=api_key is not None,
        hosts=cfg.allow_host,
        origins=cfg.allow_origin,
        content_types=cfg.allow_content_type,
        most=cfg.max_connections,
    )
    server = Server(
        driver,
        tokenizer,
        limits,
        name=name,
        context=engine.scheduler.max_length,
        fingerprint=fingerprint,
        api_key=api_key,
        access=access,
    )
    pool = ConnectionPool(
        cfg.max_connections,
        head_seconds=cfg.head_seconds,
        body_seconds=cfg.read_seconds,
        write_seconds=cfg.write_seconds,
        count=lambda status: server.metrics.count("requests", route="(none)", status=status),
    )
    options = uvicorn.Config(
        server.app(),
        http=pool.protocol(),
        ws="none",
        log_level="warning",
        timeout_keep_alive=30,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(cfg.drain_seconds)),
    )
    _allow_files(3 * cfg.max_connections + 1024)
    # What is there by now stays: the garbage collector need not look at it while requests are parsed.
    gc.freeze()
    where = f"http://{cfg.host}:{listening.getsockname()[1]}/v1"
    keyed = "with the key of " + KEY if api_key else "without a key"
    # Clients that wait for the line may connect at once.
    listening.listen(BACKLOG)
    print(f"serving {name} on {where}, {keyed}; {engine.pages * engine.page_size} tokens of cache", file=sys.stderr)
    driver.start()
    web = HttpServer(options)
    # Its own way raises the signal again at its end, which would leave the engine and the other ranks as they are.
    web.capture_signals = lambda: _signals_to(web.handle_exit)
    try:
        web.run(sockets=[listening])
    finally:
        driver.close(drain_seconds=1.0)
        listening.close()
        runtime.stop()
    print(f"served {engine.generated} tokens", file=sys.stderr)


def _listening(cfg: Config) -> socket.socket:
    """The socket of the host and port.

    Raises:
        ValueError: it cannot be had; says why.
    """
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    server_socket = socket.socket(family, socket.SOCK_STREAM)
    server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server_socket.bind((cfg.host, cfg.port))
    except OSError as error:
        server_socket.close()
        raise ValueError(f"host, port: expected a free address, got {cfg.host}:{cfg.port}: {error.strerror}") from None
    return server_socket


def _allow_files(count: int) -> None:
    """Raise this process's limit of open files, which connections are.

    Raises:
        ValueError: the system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise ValueError(
                f"max_connections: expected room for {count} open files, got a limit of {hard}; lower --max-connections"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@contextlib.contextmanager
def _signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGTERM and SIGINT go to a handler inside the block."""
    former = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def _engine(cfg: Config, tokenizer: Tokenizer, rt: runtime.Runtime) -> tuple[Engine, object, str]:
    """The engine over this rank's part of the model, the mesh, and a fingerprint of the weights."""
    dtype = weights_dtype(cfg.dtype, rt.device)
    with ModelDirectory(cfg.model) as directory:
        if directory.outputs is not None:
            raise ValueError(f"{cfg.model}: expected a language model, got a reward model; it cannot answer")
        experts = cfg.tp if directory.config.experts else 1
        mesh = make_mesh(MeshOptions(dp_shard=1, tp=cfg.tp, ep=experts), rt)
        model, specs = empty_sampler(directory.config, dtype, mesh)
        for name, parameter in model.named_parameters():
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=rt.device)
            directory.read(name, 0, parameter.data.view(-1), spec=specs[name])
    engine = Engine(
        model,
        cache_tokens=_cache_tokens(cfg, model, rt),
        max_sequences=cfg.max_sequences,
        allowed_ids=allowed_ids(tokenizer, directory.config.vocab_size),
    )
    digest = checksum((name, specs[name], 0, p.data.view(-1)) for name, p in model.named_parameters())
    return engine, mesh, "fp_" + hashlib.sha256(f"{digest}{dtype}".encode()).hexdigest()[:12]


def _cache_tokens(cfg: Config, model: Transformer, rt: runtime.Runtime) -> int:
    each = cache_bytes(model, 1)
    if cfg.cache_gib is not None:
        tokens = int(cfg.cache_gib * 2**30) // each
    elif rt.device.type == "cuda":
        tokens = int(0.9 * torch.cuda.mem_get_info(rt.device)[0]) // each
    else:
        tokens = 2**31 // each
    tokens = min(tokens, cfg.max_sequences * model.config.max_positions)
    if tokens < 256:
        raise ValueError(f"cache_gib: expected room for 256 tokens of {each} bytes or more, got {tokens}")
    return tokens


if __name__ == "__main__":
    launch(main, Config)
