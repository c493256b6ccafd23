"""The hot path on a device without values; started by test_latent.py, as a process of its own.

    python tests/fake_gpu.py RECORDS FAMILY

A CPU build of torch cannot trace "cuda" (autograd aborts), but a device that Python registers.  Printed is
for what a GPU would have to be waited for: names of operations.  FAMILY: one of test_plume.py's, or lora.
"""

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import train
from curriculum import Stage
from data import collate, to_device
from engine.trained import add_lora
from test_plume import eight_pairs, mixed_items, rendered, tiny_model


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def get_rng_state(self, device):
        return torch.zeros(0)

    def set_rng_state(self, state, device):
        pass


backend_registration._setup_privateuseone_for_python_backend("gpu", Backend())
torch._C._set_only_lift_cpu_tensors(True)


def all_rows(x):
    return torch.empty(len(x), 1, dtype=torch.long, device="gpu")


LOOKS = {torch.ops.aten._local_scalar_dense.default: lambda x: False,
         torch.ops.aten.nonzero.default: all_rows}


class FakeGPU(TorchDispatchMode):
    """Computes what is on the CPU; of what is on "gpu" only shapes.  Asking for a value raises."""

    def __init__(self):
        super().__init__()
        self.fake, self.waits, self.looks = FakeTensorMode(), [], None  # looks: a list where they are allowed

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        if not on_gpu and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return op(*args, **kwargs)
        if op is torch.ops.aten._to_copy.default:  # between devices: waits, unless it is told not to
            moves = torch.device(kwargs.get("device") or tensors[0].device).type != tensors[0].device.type
            waits = moves and not kwargs.get("non_blocking")
        else:  # an index or a mask that was left on the CPU
            waits = any(x.dim() and not isinstance(x, FakeTensor) for x in tensors)
        if waits:
            self.waits.append(str(op))
        if self.looks is not None and op in LOOKS:  # says that no row has stopped, then that all have
            self.looks.append(str(op))
            with self.fake:
                return LOOKS[op](*args)
        args, kwargs = tree_map_only(torch.Tensor, self.as_fake, (args, kwargs))
        with self.fake:
            return op(*args, **kwargs)

    def as_fake(self, x):
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)


def main(records, family):
    records, gpu = Path(records), FakeGPU()
    lora = family == "lora"
    m = tiny_model("qwen2_vl" if lora else family).float()
    batch = collate(rendered(m, mixed_items(records.parent)), m.processor)
    cfg = train.Config(matryoshka="32", w_cross=0.3, micro_tokens=150 if lora else 0)
    batches, (step, _, rows) = eight_pairs(records, m.processor, micro_tokens=cfg.micro_tokens)
    pairs = batches[step, Stage(2, 2, True), rows[:2]]
    if lora:
        add_lora(train.Config(lora=4), m)
        assert len(pairs["micro"]) > 1
    with gpu.fake:
        m._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="gpu"))
    with gpu:
        for mode, steps in (("single", None), ("latent", 2), ("cot", None)):
            vectors, _ = m.embed(to_device(batch, "gpu"), mode, steps, limit=2)
            assert vectors.shape == (len(batch["ids"]), 128) and vectors.dtype == torch.float32
        m.settings["adaptive"], gpu.looks = True, []
        m.embed(to_device(batch, "gpu"), "auto", 3, limit=2)  # a look a step, then which rows go which way
        assert sorted(gpu.looks) == 3 * ["aten._local_scalar_dense.default"] + 2 * ["aten.nonzero.default"]
        m.settings["adaptive"], gpu.looks = False, None
        trained = [p for p in m.parameters() if p.requires_grad]
        optimizer, m.checkpointing = torch.optim.AdamW(trained), lora
        train.backward(m, pairs, cfg, contextlib.nullcontext())
        assert all(p.grad.device.type == "gpu" for p in trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    # what would be found
    found, gpu.waits = gpu.waits, []
    with gpu:
        m.lm.embed_tokens.weight[torch.arange(3)]
        with pytest.raises(DataDependentOutputException):
            m.adapter.w2.max().item()
    assert gpu.waits == ["aten.index.Tensor"]
    print(*sorted(set(found)), sep="\n", flush=True)
    os._exit(bool(found))  # at a usual exit the device's thread aborts


main(*sys.argv[1:])
