"""What a computation takes: memory, seconds, operations, kernels."""

import functools
import math
import time
import weakref
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: `now` those still alive, `peak` the most at one time."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(s) for s in storages((args, kwargs))}  # a view of these is no new memory
        out = function(*args, **(kwargs or {}))
        for s in storages(out):
            if id(s) not in given | self.known:
                self.known.add(id(s))
                self.now += s.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(s, self.free, id(s), s.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class CudaBytes:
    """The same as CUDA's allocator counts them."""

    def __init__(self):
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    @property
    def now(self):
        return torch.cuda.memory_allocated() - self.before

    @property
    def peak(self):
        return torch.cuda.max_memory_allocated() - self.before


def bytes_counter(device):
    return nullcontext(CudaBytes()) if device.type == "cuda" else LiveBytes()


def peak_bytes(function, device):
    """The most memory that one call takes beside what is there before."""
    with bytes_counter(device) as counter:
        function()
    return counter.peak


def rounds(functions, repeats, device):
    """{name: seconds of each call}, the functions by turns, so that all of them meet the same noise."""
    times = {name: [] for name in functions}
    synchronize = torch.get_device_module(device).synchronize  # a GPU is still at work when a call returns
    for i in tqdm(range(repeats), desc="timed rounds", leave=False):
        for name, function in functions.items():
            if i < 2 or times[name][0] < 5:
                synchronize()
                begun = time.perf_counter()
                function()
                synchronize()
                times[name].append(time.perf_counter() - begun)
    return times


def peak_rates(device, dtype):
    """What the device gives now: FLOP a second in a large matrix product, bytes a second read by a sum."""
    n, size = (8192, 1 << 33) if device.type == "cuda" else (1536, 1 << 28)
    a = torch.randn(n, n, device=device, dtype=dtype)
    long = torch.zeros(size // 4, device=device)
    times = rounds({"product": functools.partial(torch.mm, a, a), "sum": long.sum}, 6, device)
    return 2 * n**3 / min(times["product"]), size / min(times["sum"])


def attention_flops(q, k, *others, **more):
    """Two products of q's rows with all keys; q and k are shapes (B, H, L, d)."""
    return 4 * math.prod(q) * k[-2]


def product_flops(x, a, b, **more):
    """x + a b: shapes (n, m), (n, k), (k, m)."""
    return 2 * math.prod(a) * b[-1]


# kernels that torch's counter does not know
UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
                    torch.ops.aten.addmm_: product_flops}


def count_work(function, device):
    """-> FLOP of one call, peak bytes.  It is also the warm-up."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as flops:
        peak = peak_bytes(function, device)
    return flops.get_total_flops(), peak


class Kernels(TorchDispatchMode):
    """Counts operators that compute or move something: on a GPU each is a kernel, or a few.

    An RMSNorm, which a CPU takes six operators for, counts one inside `OneKernel`, as CUDA has one kernel
    (aten::_fused_rms_norm, pytorch/pytorch pull request 153666).
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        looks_only = operator.is_view or operator in (torch.ops.aten._unsafe_view.default,
                                                      torch.ops.aten.promote_types.default)
        if not looks_only:
            self.count += 1
        return operator(*args, **(kwargs or {}))


class OneKernel(TorchFunctionMode):
    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before = self.kernels.count
        out = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.rms_norm:
            self.kernels.count = before + 1
        return out


@torch.no_grad()
def kernels_of_a_step(model, batch):
    """Kernels of one latent step: those of 8 steps without those of 4, divided by 4."""
    counts = {}
    for steps in (4, 8):
        with Kernels() as kernels, OneKernel(kernels):
            model.embed(batch, "latent", steps)
        counts[steps] = kernels.count
    return (counts[8] - counts[4]) / 4
