"""The hot path on a device without values; started by test_latent.py, as a process of its own.

    python tests/fake_gpu.py RECORDS FAMILY

A CPU build of torch cannot trace "cuda" (autograd aborts), but a device that Python registers.  Printed are
the operations that a GPU would have to be waited for.  FAMILY: one of test_plume.py's, or lora.
"""

import contextlib
import copy
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import train
from adapter import TransitionAdapter
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

# autocast, which such a device lacks: nearly CUDA's lists, of the operators used here
aten, AUTOCAST = torch.ops.aten, torch._C.DispatchKey.AutocastPrivateUse1
IN_BFLOAT16 = [aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
               aten.addmm.default, aten.baddbmm.default, aten.conv3d.default,
               aten.scaled_dot_product_attention.default]
IN_FLOAT32 = [aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int, aten.log_softmax.int,
              aten.cross_entropy_loss.default, aten.pow.Tensor_Scalar, aten.sum.default, aten.sum.dim_IntList]


def casting(op, dtype):
    def cast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(AUTOCAST)):
            given = tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x,
                                  (args, kwargs))
            return op(*given[0], **given[1])
    return cast


# kept as long as their rules are to hold; "_": of all other operators
rules, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for operators, to in ((IN_BFLOAT16, torch.bfloat16), (IN_FLOAT32, torch.float32)):
    for operator in operators:
        rules.impl(operator, casting(operator, to), "AutocastPrivateUse1")


def all_rows(x):
    return torch.empty(len(x), 1, dtype=torch.long, device="gpu")


PRODUCTS = (aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.bmm.default, aten.baddbmm.default)
LOOKS = {aten._local_scalar_dense.default: lambda x: False,
         aten.nonzero.default: all_rows}


class FakeGPU(TorchDispatchMode):
    """Computes what is on the CPU; of what is on "gpu" only shapes.  Asking for a value raises."""

    def __init__(self):
        super().__init__()
        self.fake, self.waits = FakeTensorMode(), []
        self.products = set()  # dtypes of matrix products
        self.looks = None  # a list where they are allowed

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        if not on_gpu and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return op(*args, **kwargs)
        if op in (aten._to_copy.default, aten.copy_.default):  # between devices: waits, unless told not to
            to = kwargs.get("device") or tensors[0].device
            told = kwargs.get("non_blocking") or op is aten.copy_.default and args[2:] == (True,)
            waits = torch.device(to).type != tensors[-1].device.type and not told
        else:  # an index or a mask that was left on the CPU
            waits = any(x.dim() and not isinstance(x, FakeTensor) for x in tensors)
        if waits:
            self.waits.append(str(op))
        if self.looks is not None and op in LOOKS:  # says that no row has stopped, then that all have
            self.looks.append(str(op))
            with self.fake:
                return LOOKS[op](*args)
        if len(on_gpu) < len(tensors):
            args, kwargs = tree_map_only(torch.Tensor, self.as_fake, (args, kwargs))
        if op in PRODUCTS:
            self.products.add(args[-1].dtype)
        with self.fake:
            return op(*args, **kwargs)

    def as_fake(self, x):
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)


def main(records, family):
    records, gpu = Path(records), FakeGPU()
    lora = family == "lora"
    m = tiny_model("qwen2_vl" if lora else family).float()
    items = mixed_items(records.parent)[::2]  # text, picture, clip
    batch = collate(rendered(m, items), m.processor)
    cfg = train.Config(matryoshka="32", w_cross=0.3, micro_tokens=150 if lora else 0)
    batches, (step, _, _) = eight_pairs(records, m.processor, micro_tokens=cfg.micro_tokens)
    pairs = batches[step, Stage(2, 2, True), np.array([1, 3])]
    assert any(len(group["grid"]) and group["grid"][:, 0].max() > 1 for group in pairs["micro"][0])  # a clip
    if lora:
        add_lora(train.Config(lora=4), m)
        assert len(pairs["micro"]) > 1
    m.checkpointing = lora
    for dtype in (torch.float32, torch.bfloat16):
        embeds(gpu, on_gpu(gpu, copy.deepcopy(m).to(dtype)), batch)  # bfloat16: as `from_pretrained` loads it
        assert (torch.bfloat16 in gpu.products) == (dtype == torch.bfloat16)
        gpu.products.clear()
        trains(gpu, on_gpu(gpu, copy.deepcopy(m)), pairs, cfg, dtype)
        assert (torch.bfloat16 in gpu.products) == (dtype == torch.bfloat16)
    found, gpu.waits = gpu.waits, []
    if lora:
        finds(gpu, on_gpu(gpu, m), batch, pairs, cfg)
    print(*sorted(set(found)), sep="\n", flush=True)
    os._exit(bool(found))  # at a usual exit the device's thread aborts


def on_gpu(gpu, m):
    with gpu.fake:
        return m._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="gpu"))


def embeds(gpu, m, batch):
    with gpu:
        for mode, steps in (("single", None), ("latent", 2), ("cot", None)):
            vectors, _ = m.embed(to_device(batch, "gpu"), mode, steps, limit=2)
            assert vectors.shape == (len(batch["ids"]), 128) and vectors.dtype == torch.float32
        m.settings["adaptive"], gpu.looks = True, []
        m.embed(to_device(batch, "gpu"), "auto", 3, limit=2)  # a look a step, then which rows go which way
        assert sorted(gpu.looks) == 3 * ["aten._local_scalar_dense.default"] + 2 * ["aten.nonzero.default"]
        gpu.looks = None


def trains(gpu, m, pairs, cfg, dtype):
    """A step; bfloat16: of float32 weights under autocast."""
    trained = [p for p in m.parameters() if p.requires_grad]
    with gpu:
        optimizer = torch.optim.AdamW(trained, fused=True)
        train.backward(m, pairs, cfg, torch.autocast("gpu", dtype, enabled=dtype == torch.bfloat16))
        assert all(p.grad.device.type == "gpu" and p.grad.dtype == torch.float32 for p in trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def finds(gpu, m, batch, pairs, cfg):
    """An index that was left on the CPU, and an .item() in the adapter."""
    forward = TransitionAdapter.forward

    def asks(self, z, step, anchor):
        return forward(self, z * z.max().item(), step, anchor)

    with gpu, mock.patch.object(TransitionAdapter, "forward", asks):
        m.lm.embed_tokens.weight[torch.arange(3)]
        assert gpu.waits == ["aten.index.Tensor"]
        with pytest.raises(DataDependentOutputException):
            m.embed(to_device(batch, "gpu"), "latent", 2)
        with pytest.raises(DataDependentOutputException):
            train.backward(m, pairs, cfg, contextlib.nullcontext())


main(*sys.argv[1:])
