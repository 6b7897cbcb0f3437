"""What the host reads of tensors, for the tests of training loops."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")


class HostReads(TorchDispatchMode):
    """Into `log`: `read` whenever the host reads numbers of a tensor; on a GPU it would wait for the device there."""

    def __init__(self, log, monkeypatch):
        super().__init__()
        self.log, inner = log, torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: log.append("read") or inner(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.split(".")[0] in READS:
            self.log.append("read")
        return func(*args, **(kwargs or {}))
