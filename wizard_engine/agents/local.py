"""A checkpoint as an agent: this project's, or another one that speaks its own chat template."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from wizard_engine.data.chat import encode_opening, encode_prompt, use_chat_format
from wizard_engine.data.chat_format import ChatFormatChoice
from wizard_engine.data.tokenizer import Tokenizer
from wizard_engine.generation.allowed_ids import allowed_ids
from wizard_engine.generation.offline import Generation, continued, engine_for
from wizard_engine.generation.scheduler import Sampling
from wizard_engine.model import Transformer, load_model
from wizard_engine.runtime.metrics import byte_bar

from .protocol import Reply, Request

# Of the fingerprint: what Vicuna's segments are.
_VICUNA = "vicuna-v1.1/2"


class LocalAgent:
    """A language model in this process, asked in the chat format of its tokenizer.

    A reply is the next assistant turn, for task "user" the next user turn. It depends on its request alone; a greedy
    one (temperature 0) does not depend on the seed. A prompt that leaves no room in the context is a failed call, and
    so is a conversation that the model's chat template refuses.

    Args:
        model: on its device.
        name: for display; the fingerprint is a hash of the weights, the tokenizer and the chat format.
        batch_size: conversations generated together.
    Attributes:
        generating: replies that are finished, and all, of the generation that runs; (0, 0) without one.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, name: str, *, batch_size: int = 256) -> None:
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        self._is_stopped = False
        self.generating = (0, 0)

    def stop(self) -> None:
        """End a generation that runs in another thread; it raises ValueError there."""
        self._is_stopped = True

    def _finished(self, count: int) -> None:
        """Count replies of the generation that runs; ValueError where it was ended."""
        done, of = self.generating
        self.generating = (done + count, of)
        if self._is_stopped:
            raise ValueError(f"agent {self.name}: the generation was ended")

    @classmethod
    def from_directory(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        chat_format: ChatFormatChoice = "auto",
    ):
        """The model of a saved directory, named after the last parts of its path.

        Args:
            chat_format: see `chat_format.chosen_format`.
        Raises:
            ValueError: the directory holds a reward model, or its chat template cannot be used.
        """
        model, tokenizer = load_model(Path(path), device=device)
        if not isinstance(model, Transformer):
            raise ValueError(f"{path}: expected a language model, got a reward model; it cannot answer")
        use_chat_format(tokenizer, chat_format, vocab_size=model.config.vocab_size)
        return cls(model.eval(), tokenizer, "/".join(Path(path).parts[-3:]), batch_size=batch_size)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of chat format, tokenizer and weights, 16 hex digits; computed at first use."""
        own = self.tokenizer.chat_format
        chat_format = _VICUNA if own.is_vicuna else f"template/1 {own.digest} {self.tokenizer.template_variables()}"
        digest = hashlib.sha256(f"{chat_format}\0{self.tokenizer.fingerprint}\0{self.model.config}".encode())
        if len(self.tokenizer.eos_ids) > 1:
            digest.update(f"{self.tokenizer.eos_ids}\0".encode())
        state = sorted(self.model.state_dict().items())
        with byte_bar(f"fingerprint {self.name}", sum(tensor.nbytes for _, tensor in state)) as bar:
            for name, tensor in state:
                digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                bar.update(tensor.nbytes)
        return digest.hexdigest()[:16]

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests, all of them in one generation."""
        self._is_stopped = False
        prompts = [self._prompt(request) for request in requests]
        replies = [
            prompt if isinstance(prompt, Reply) else self._refusal(prompt, request)
            for prompt, request in zip(prompts, requests)
        ]
        asked = [i for i, reply in enumerate(replies) if reply is None]
        if asked:
            samplings = [self._sampling(prompts[i], requests[i]) for i in asked]
            asked_prompts = [prompts[i] for i in asked]
            generation = self._generated(asked_prompts, samplings)
            for index, tokens, finished, error in zip(asked, generation.tokens, generation.finished, generation.errors):
                text = self.tokenizer.decode(tokens).strip()
                turn = self._turn_text(text, requests[index].task)
                whole = Reply(turn, finish="stop" if finished or turn != text else "length")
                replies[index] = Reply("", f"answer failed: {error}") if error else whole
        return replies

    def _generated(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> Generation:
        allowed = allowed_ids(self.tokenizer, self.model.config.vocab_size)
        engine = engine_for(self.model, prompts, samplings, self.batch_size, allowed_ids=allowed)
        self.generating = (0, len(prompts))
        try:
            return continued(engine, prompts, samplings, on_finished=self._finished)
        finally:
            self.generating = (0, 0)

    def _sampling(self, prompt: list[int], request: Request) -> Sampling:
        """Sampling options of a request; different prompts with the same seed draw different numbers."""
        row = int.from_bytes(hashlib.sha256(repr(prompt).encode()).digest()[:7], "big")
        top_p = None if request.top_p == 1 else request.top_p
        options = {"seed": request.seed, "row": row, "top_p": top_p, "eos_ids": self.tokenizer.eos_ids}
        return Sampling(request.max_tokens, float(request.temperature), **options)

    def _prompt(self, request: Request) -> list[int] | Reply:
        """Ids of a request; a failed call where the model's template refuses its messages."""
        if request.task == "user" and (not request.messages or request.messages[-1].role != "assistant"):
            got = request.messages[-1].role if request.messages else "no messages"
            raise ValueError(
                f"task 'user': expected a conversation that ends with an assistant turn, got {got!r}; add it"
            )
        encode = encode_opening if request.task == "user" else encode_prompt
        if self.tokenizer.chat_format.is_vicuna:
            return encode(self.tokenizer, request.messages)
        try:
            return encode(self.tokenizer, request.messages)
        except ValueError as error:
            return Reply("", f"chat template: {error}")

    def _refusal(self, prompt: list[int], request: Request) -> Reply | None:
        room = self.model.config.max_positions - request.max_tokens
        if len(prompt) <= room:
            return None
        return Reply(
            "", f"prompt: expected at most {room} tokens, to leave {request.max_tokens} free, got {len(prompt)}"
        )

    def _turn_text(self, text: str, task: str) -> str:
        """The turn of a reply. In Vicuna a user's turn has no end of its own: it ends at the answer's heading."""
        if task == "user" and self.tokenizer.chat_format.is_vicuna:
            return text.partition("ASSISTANT:")[0].strip()
        return text
