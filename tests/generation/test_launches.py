"""What a decode step launches: per layer the matrix products and the kernels, and no torch operation beside them."""

from collections import Counter
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels.launch import record
from kernels.rope import rope_tables
from wizard_engine.generation.engine import Engine, Sampling
from wizard_engine.model import PRESETS, Transformer

# What changes no memory of the device.
FREE = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "t", "transpose", "detach", "alias", "as_strided"}
FREE |= {"select", "slice", "unsqueeze", "split", "split_with_sizes", "expand", "permute", "reshape"}


class Operations(TorchDispatchMode):
    """Counts torch operations that a device would be told to do."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("aten::") and name.removeprefix("aten::") not in FREE:
            self.counts[name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def launched(layers, monkeypatch):
    """Operations and kernels of one decode step of batch 1, as on a GPU: tables of angles made before."""
    model = Transformer(replace(PRESETS["tiny"], init_std=0.3, layers=layers), seed=4).eval()
    engine = Engine(model, cache_tokens=160)
    engine.tables = rope_tables(torch.arange(64), engine.config.head_width, engine.config.rope_base)
    # Rows of a GPU: without padding.
    engine.packer.unit = 1
    engine.add([3, 4], Sampling(4))
    engine.step()
    monkeypatch.setattr(kernels.backend, "INTERPRETED", True)
    step = engine._staged(engine.packer.pack(engine.scheduler.plan()), [], [], ())[0]
    # Values of index tensors are not looked at on a GPU.
    for module in (kernels.paged_attention, kernels.decode_attention):
        monkeypatch.setattr(module, "values_are_checked", lambda tensor: False)
    with torch.no_grad(), kernels.use_backend("triton"), record() as launches, Operations() as operations:
        engine._blocks(step)
    return operations.counts, Counter(launch.kernel.__name__.removesuffix("_kernel") for launch in launches)


def test_a_layer_launches_four_products_and_five_kernels(monkeypatch):
    (two, kernels_2), (five, kernels_5) = (launched(layers, monkeypatch) for layers in (2, 5))
    # The tokens' places and their rows of the embedding.
    assert two == {"mm": 4 * 2, "index_select": 1, "embedding": 1} and five == two + Counter({"mm": 4 * 3})
    layer = {"rms_norm_forward": 2, "write_pages": 1, "decode_attention": 1, "swiglu_forward": 1}
    assert kernels_2 == Counter({"rms_norm_forward": 1}) + Counter({n: 2 * c for n, c in layer.items()})
    assert kernels_5 - kernels_2 == Counter({n: 3 * c for n, c in layer.items()})
