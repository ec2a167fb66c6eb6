"""CPU and gloo compatibility of megatron-core 0.19.2, in one place.

megatron-core asks for the current CUDA device, CUDA streams and CUDA random states on its common
code paths. `install` answers each of them with the CPU's, before the first import of megatron-core.

Unusual in this file:

- a `TorchFunctionMode` is entered and never left. Modes are thread-local and survive `fork`: the
  thread that imports `ring_train.platform`, and its forked children, are the ones that may call
  megatron-core. The backward pass of a CPU graph runs in the calling thread.
- `torch.compile` is the identity while megatron-core is imported: inductor needs a C++ compiler
  and costs seconds at import.
- names of megatron-core are rebound; each line in `_patch_megatron` says which failure it repairs.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from ring_train.platform.uneven import padded_gather, padded_reduce_scatter

CPU = torch.device("cpu")
_REWRITTEN = frozenset((torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to))


class _CudaAsCpu(TorchFunctionMode):
    """Answers requests for CUDA tensors with CPU tensors, and for tensor types with CUDA's names.

    The type names matter: clip_grads and the mixed-precision optimizer compare them to
    "torch.cuda.FloatTensor" and its like.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Called for every torch function, so the common case does as little as can be.
        if func in _REWRITTEN:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.", 1)
            if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
                args = (args[0], CPU, *args[2:])
        if not kwargs:
            return func(*args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


@contextlib.contextmanager
def native_calls() -> Iterator[None]:
    """Calls of torch inside this context are not looked at, which spares a third of a small step.

    For code that asks for no CUDA tensor by name: forwards of this project's model.
    """
    with torch._C.DisableTorchFunction():
        yield


class _Event:
    """A CUDA event or stream on which everything has happened already."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    def wait(self, *_: object) -> None: ...

    def wait_event(self, *_: object) -> None: ...

    def wait_stream(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "_Event") -> float:
        return 0.0

    def __enter__(self) -> "_Event":
        return self

    def __exit__(self, *_: object) -> None: ...


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW with the state layout of Apex and Transformer Engine.

    Per parameter `exp_avg` and `exp_avg_sq`; `step` once per group, as an int. The distributed
    optimizer saves and restores this layout only: with torch's AdamW, whose `step` is per
    parameter, its resume fails. So checkpoints of CPU runs have the form of GPU runs.

    Args:
        adam_w_mode: decoupled weight decay (AdamW); False adds the decay to the gradient.
        capturable: accepted for the signature of the fused classes; must be False.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert not capturable, "CUDA graphs need CUDA"
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update every parameter that has a gradient; count the step of every non-empty group."""
        assert closure is None, "megatron-core passes no closure"
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        lr, weight_decay = group["lr"], group["weight_decay"]
        if self.adam_w_mode:
            param.mul_(1 - lr * weight_decay)
        elif weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1 = 1 - beta1 ** group["step"]
        correction2 = 1 - beta2 ** group["step"]
        denominator = (state["exp_avg_sq"] / correction2).sqrt_().add_(group["eps"])
        param.addcdiv_(state["exp_avg"], denominator, value=-lr / correction1)


@functools.cache
def install() -> bool:
    """Make megatron-core run on the CPU if there is no CUDA; return whether that was needed."""
    if torch.cuda.is_available():
        return False
    _patch_torch_cuda()
    with _without_compile(), warnings.catch_warnings():
        # megatron-core says once per module that Transformer Engine is absent, torch that CUDA is.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        _patch_megatron()
    _CudaAsCpu().__enter__()
    return True


def _patch_torch_cuda() -> None:
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    # A function of its own: torch._dynamo refuses one function under two names.
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    replacements = {
        "current_device": lambda: CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: _Event(),
        "default_stream": lambda device=None: _Event(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Event,
        "Event": _Event,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "manual_seed": manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, replacement)


@contextlib.contextmanager
def _without_compile() -> Iterator[None]:
    """torch.compile returns its argument inside this context."""

    def identity(model: Any = None, **_: object) -> Any:
        return model if model is not None else lambda function: function

    with mock.patch.object(torch, "compile", identity):
        yield


def _patch_megatron() -> None:
    import megatron.core.jit
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    # Modules imported later must not compile either.
    megatron.core.jit.disable_jit_fuser()

    # The original indexes torch.cuda.default_generators, which is empty.
    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._set_cuda_rng_state = set_rng_state

    # The original leaves CPU tensors as they are, and all_to_all_single refuses tensor splits.
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move

    _patch_engine_kernels()

    # gloo refuses parts of different lengths.
    mappings._gather_along_first_dim = padded_gather(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = padded_reduce_scatter(
        mappings._reduce_scatter_along_first_dim
    )

    # See FusedAdam. Where Apex or Transformer Engine can be imported without CUDA, still ours.
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = False
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _patch_engine_kernels() -> None:
    """Where Transformer Engine can be imported, kernels of it would be called that need CUDA."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None
