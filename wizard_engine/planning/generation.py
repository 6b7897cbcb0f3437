"""Time in which GPUs generate answers, by the planner's rates: a model, no measurement.

    prefill    2 operations for every weight that a token of a prompt is multiplied with, at the rate of matrices
    decoding   every step of a group of GPUs reads all weights once, and the keys and values of its sequences, at the
               rate of memory; its operations are those of a prefill of as many tokens

A group holds a whole copy of the model. Experts that no token of a step is sent to are read all the same; transfers
between the GPUs of a group and the work of attention are neglected. Products are taken to be in bf16.
"""

import math
from dataclasses import dataclass

from .flops import matrix_parameters
from .planner import Planner


@dataclass(frozen=True)
class Answers:
    """Answers to generate.

    count: of them.   prompt, answer: mean tokens of each.   at_once: that a group generates together, at most.
    """

    count: float
    prompt: float
    answer: float
    at_once: int


class Generation:
    """Generation with a planner's model on its GPUs.

    Args:
        planner: of the model and the kind of GPU.   gpus: that generate.
        group: of them that share a copy of the model; None: as few as hold it, a power of two.
        value_bytes: of a weight, a key or a value.
    Attributes:
        weight_bytes: of the model.   smallest: group that holds it.   groups: that generate at once.
    """

    def __init__(self, planner: Planner, gpus: int, group: int | None = None, *, value_bytes: int = 2) -> None:
        self.config, self.rates, self.gpu = planner.config, planner.rates, planner.gpu
        self.value_bytes = value_bytes
        self.weight_bytes = value_bytes * sum(parameter.numel() for parameter in planner.model.parameters())
        self.smallest = 1 << max(0, math.ceil(math.log2(self.weight_bytes / planner.room)))
        self.group = group or self.smallest
        self.groups = max(1, gpus // self.group)

    def gpu_seconds(self, answers: Answers) -> float:
        """Seconds of all GPUs together, those of idle groups included."""
        each = math.ceil(answers.count / self.groups)
        if not each:
            return 0.0
        c, bandwidth = self.config, self.group * self.gpu.bandwidth * self.rates.memory
        # Where one sequence ends the next begins.
        steps = max(1.0, each / answers.at_once) * answers.answer
        keys = 2 * c.layers * c.kv_heads * c.head_width * self.value_bytes * (answers.prompt + answers.answer / 2)
        read = steps * self.weight_bytes + each * answers.answer * keys
        operations = 2 * matrix_parameters(c) * each * (answers.prompt + answers.answer)
        seconds = read / bandwidth + operations / (self.group * self.gpu.flops * self.rates.matrix)
        return seconds * self.group * self.groups
