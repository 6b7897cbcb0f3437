"""A server over a small random model in a thread of this process, for tests and their clients."""

import contextlib
import threading
import time

import httpx
import uvicorn

from wizard_engine.data.chat import CHAT_ATOMS
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation.engine import Engine
from wizard_engine.model import ModelConfig, Transformer
from wizard_engine.serving.connections import ConnectionPool, HttpServer
from wizard_engine.serving.driver import Driver
from wizard_engine.serving.guard import access_of
from wizard_engine.serving.server import Limits, Server

TEXTS = ["What is two and three? It is five. Count to ten: one two three four five six seven eight nine ten."]


def small_model(**changes):
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, atoms=CHAT_ATOMS)
    shapes = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "ffn_width": 48} | changes
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_positions=256, init_std=0.25, **shapes)
    return Transformer(config, seed=5).eval(), tokenizer


class Serving:
    """A running server: `url`, a client `web`, `driver`, `engine`, and a `slow` knob for steps, seconds."""

    def __init__(
        self,
        *,
        api_key=None,
        cache_tokens=4096,
        max_sequences=16,
        max_jobs=64,
        made=None,
        most_waiting=64,
        head_seconds=10.0,
        access=None,
        **limits,
    ):
        self.model, self.tokenizer = made or small_model()
        self.engine = Engine(self.model, cache_tokens=cache_tokens, max_sequences=max_sequences)
        self.driver = Driver(self.engine, self.tokenizer, max_jobs=max_jobs)
        self.slow, step = 0.0, self.engine.step

        def slowed():
            if self.slow:
                time.sleep(self.slow)
            return step()

        self.engine.step = slowed
        context = self.engine.scheduler.max_length
        self.server = Server(
            self.driver,
            self.tokenizer,
            Limits(**{"new_tokens": 128} | limits),
            name="small",
            context=context,
            fingerprint="fp_test",
            api_key=api_key,
            access=access_of("127.0.0.1", has_key=api_key is not None, **access or {}),
        )
        write_seconds = limits.get("write_seconds", 30.0)
        self.pool = ConnectionPool(
            most_waiting,
            head_seconds=head_seconds,
            body_seconds=limits.get("read_seconds", 30.0),
            write_seconds=write_seconds,
            count=lambda status: self.server.metrics.count("requests", route="(none)", status=status),
        )
        http = self.pool.protocol()
        options = {"log_level": "warning", "lifespan": "off", "ws": "none"}
        config = uvicorn.Config(self.server.app(), port=0, http=http, **options)
        self.socket = config.bind_socket()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # One client for many requests: each makes its own TLS context, which takes longer than an answer.
        self.web = httpx.Client(base_url=self.url, timeout=60)
        self.uvicorn = HttpServer(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.driver.start()
        self.thread.start()
        self.until(lambda: self.uvicorn.started)
        return self

    def __exit__(self, *_):
        self.web.close()
        self.uvicorn.should_exit = True
        self.thread.join(10)
        with contextlib.suppress(RuntimeError):
            self.driver.close()
        self.socket.close()

    def until(self, condition, seconds=10):
        """Wait for something that another thread does."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.005)

    def is_idle(self):
        """Nothing runs or waits, and every page is free."""
        return not self.driver.open and not self.engine.has_work and self.engine.pool.free == self.engine.pages
