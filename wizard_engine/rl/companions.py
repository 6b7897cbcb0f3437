"""Models of RLEIF that are not trained: the reference, and the reward models. Equal weights are in memory once."""

from pathlib import Path

import torch

from wizard_engine.data.tokenizer import Tokenizer, load_tokenizer
from wizard_engine.model import ScoringModel, Transformer
from wizard_engine.model.heads import scoring_head
from wizard_engine.model.hugging_face import ModelDirectory
from wizard_engine.model.loading import fill, shard_model
from wizard_engine.model.vocabulary import check_vocabulary
from wizard_engine.parallel import Mesh, Sharding, sharded
from wizard_engine.runtime.metrics import byte_bar
from wizard_engine.runtime.object_collectives import gather_objects

from .rewards import InstructionReward, PreferenceReward, ProcessReward

# Elements that a comparison with a file reads at once.
CHUNK = 2**22
# Field of config.json with the kind of a reward model. Those with one output and without it score instructions.
KIND = "wizard_reward"
OUTPUTS = {"instruction": 1, "process": 3, "preference": 1}
NAMES = {
    None: "a language model",
    "instruction": "an instruction reward model",
    "process": "a process reward model",
    "preference": "a preference reward model",
}


class FrozenModels:
    """Loads models that are not trained, divided over a mesh.

    The body of a reward model and the reference are the same object where their configurations and weights are equal,
    such as that of a process model whose body was frozen.

    Attributes:
        bodies: all that are loaded, each once.
    """

    def __init__(self, mesh: Mesh, sharding: Sharding | None) -> None:
        self.mesh, self.sharding = mesh, sharding
        self.bodies: list[Transformer] = []

    def reference(self, path: Path) -> Transformer:
        """The language model of a directory."""
        with ModelDirectory(path) as directory:
            return self._body(directory)

    def instruction_reward(self, path: Path, *, capacity: int) -> InstructionReward:
        """The instruction factor of a directory that recipes/reward.py wrote.

        Args:
            capacity: tokens of one forward pass.
        """
        model, tokenizer, fields = self._scoring(path, "instruction")
        return InstructionReward(
            model, tokenizer, mean=fields["wizard_mean"], std=fields["wizard_std"], capacity=capacity
        )

    def process_reward(self, path: Path, *, neutral: float, capacity: int) -> ProcessReward:
        """The process factor of a directory that recipes/reward.py wrote."""
        model, tokenizer, _ = self._scoring(path, "process")
        return ProcessReward(model, tokenizer, neutral=neutral, capacity=capacity)

    def preference_reward(self, path: Path, *, capacity: int) -> PreferenceReward:
        """The preference factor of a directory that recipes/reward.py wrote."""
        model, tokenizer, _ = self._scoring(path, "preference")
        return PreferenceReward(model, tokenizer, capacity=capacity)

    def _scoring(self, path: Path, kind: str) -> tuple[ScoringModel, Tokenizer, dict]:
        """A reward model's directory: model, tokenizer, fields of config.json.

        Raises:
            ValueError: a language model, or a reward model of the other kind.
        """
        with ModelDirectory(path) as directory:
            found = _kind(directory)
            if found != kind:
                raise ValueError(f"{path}: expected {NAMES[kind]}, got {NAMES.get(found, found)}")
            tokenizer = load_tokenizer(path)
            check_vocabulary(tokenizer, directory.config, path)
            return self._with_head(self._body(directory), directory), tokenizer, directory.fields

    def _with_head(self, body: Transformer, directory: ModelDirectory) -> ScoringModel:
        """A body with a scoring head, which every rank has whole."""
        model = directory.empty_model()
        head = scoring_head(directory.config.width, model.outputs, surprise=model.surprise).requires_grad_(False)
        for name, parameter in head.named_parameters():
            directory.read(f"score.{name}", 0, parameter.data.view(-1))
        model.body, model.score = body, head.to(self.mesh.device)
        # Passes of the body take part in the collectives of its engine.
        model._sharded = sharded(body)
        return model

    def _body(self, directory: ModelDirectory) -> Transformer:
        for body in self.bodies:
            # Another body differs in its first chunk, mostly: the comparison costs little where nothing is shared.
            if body.config == directory.config and all(gather_objects(_is_equal(body, directory))):
                return body
        with torch.device("meta"):
            empty = Transformer(directory.config)
        body = shard_model(empty, self.mesh, self.sharding, frozen=True)
        fill(body, directory)
        self.bodies.append(body)
        return body


def _kind(directory: ModelDirectory) -> str | None:
    """What a directory scores, one of `OUTPUTS` or in words what else it is; None: it holds a language model."""
    if directory.outputs is None:
        return None
    kind = directory.fields.get(KIND, "process" if directory.outputs == OUTPUTS["process"] else "instruction")
    is_known = isinstance(kind, str) and OUTPUTS.get(kind) == directory.outputs
    return kind if is_known else f"{directory.outputs} outputs"


def _is_equal(body: Transformer, directory: ModelDirectory) -> bool:
    """Whether this rank's weights are those of a directory, in the dtype that they have."""
    engine = sharded(body)
    prefix = "" if directory.outputs is None else "body."
    shards = list(engine.weight_shards(exact=False))
    with byte_bar(f"compare {directory.path}", sum(values.nbytes for _, _, values in shards)) as bar:
        for name, start, values in shards:
            for at in range(0, values.numel(), CHUNK):
                chunk = values[at : at + CHUNK]
                read = torch.empty_like(chunk)
                directory.read(prefix + name, start + at, read, spec=engine.shard_specs[name])
                if not torch.equal(read, chunk):
                    return False
                bar.update(chunk.nbytes)
    return True
