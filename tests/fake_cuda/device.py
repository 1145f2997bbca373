"""A CUDA device that computes nothing: what a GPU would refuse, or wait for, is found without one, in any build of torch.

A tensor on it is a meta tensor (shapes and types without data) that answers the questions of Python code as a CUDA tensor does, so that
code which chooses by device chooses what it does there. Autograd runs, since meta tensors have a backward. (torch's fake tensors with
device="cuda" have none: in the CPU build `mm` of a parameter ends the process, and `Tensor.__setitem__` and `Tensor.__getitem__` with
indices ask for a driver; in the CUDA build a backward does. They do not compare the types of a product's operands, either.)

Within `fake_cuda()`, as on a GPU,

- an operator refuses operands of host and device together (but numbers without a dimension, where it goes element by element), a product
  operands of different types (`DeviceError`);
- what the host, or a shape, waits for is counted in `waits`: numbers that are read, copies to the host, copies of memory that is not
  pinned, streams, collectives of the host. To read is refused, unless there is an `answer`: the number that the host finds on the
  device, wherever it looks.

Nothing is compiled: FlexAttention runs as the operators that it is made of, with its BlockMask. What `torch.cuda` says of the driver is
one device, number 0.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # `set_stance` imports it, which a fake device does not survive
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_iter

from bd3_scale.attention import kernels
from tests.distributed.reads_worker import BY_MASK, READING, Reads, _by_mask

DEVICE = torch.device("cuda", 0)
ONE_TYPE = ("mm", "addmm", "bmm", "baddbmm", "linear", "dot", "mv", "native_layer_norm", "_fused_rms_norm")
"""Operators whose floating-point operands have one type on CUDA; meta tensors are not asked."""
WITH_NUMBERS = ("fill", "masked_fill", "_foreach")
"""Beginnings of the names of operators that take a number of the host, beside the elementwise ones."""
WITHIN = ("masked_fill.Tensor", "masked_fill_.Tensor", "index_fill.int_Tensor", "index_fill_.int_Tensor")
"""Operators that read their last operand, a number, before they start."""
IN_PARTS = "CompositeImplicitAutograd"
"""torch's name of operators that are made of others; in inference mode they come undivided."""
NOT_ASKED = ("/torch/", "deepspeed/accelerator/", "tests/fake_cuda/device.py", "tests/distributed/reads_worker.py", "unittest/")
"""Parts of the names of files whose lines nobody looks for."""


class DeviceError(RuntimeError):
    """What a GPU refuses."""


class Operators(Reads):
    """Looks at every operator as it is carried out, those of a backward, too."""

    supports_higher_order_operators = True

    def __init__(self, answer: float | None) -> None:
        super().__init__()
        self.answer = answer
        self.waits = self.found
        self._pinned: dict[int, Tensor] = {}
        self.places: list[str] = []
        """Of each wait the innermost line of Python that is neither torch's nor ours."""

    def wait(self, reason: str) -> None:
        self.waits[reason] += 1
        lines = (frame for frame in reversed(traceback.extract_stack()) if not any(part in frame.filename for part in NOT_ASKED))
        line = next(lines)
        self.places.append(f"{reason}: {'/'.join(Path(line.filename).parts[-3:])}:{line.lineno}")

    def pin(self, memory: Tensor) -> Tensor:
        self._pinned[memory.untyped_storage().data_ptr()] = memory
        return memory

    def is_pinned(self, memory: Tensor) -> bool:
        return memory.untyped_storage().data_ptr() in self._pinned

    def forget(self) -> None:
        """Count from here on."""
        self.waits.clear()
        self.places.clear()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if isinstance(function, torch._ops.HigherOrderOperator):
            return function(*arguments, **keywords)
        if torch.is_inference_mode_enabled() and torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), IN_PARTS):
            with self:
                return function.decompose(*arguments, **keywords)
        space, name = function._schema.name.split("::")
        tensors = [one for one in tree_iter((arguments, keywords)) if isinstance(one, Tensor)]
        if space == "c10d" and not any(map(on_device, tensors)):
            self.wait("collective of the host")
        if name == "copy_":
            return self._copied(arguments[0], arguments[1], function, arguments, keywords, *arguments[2:])
        if name == "_to_copy":
            return self._copied(None, arguments[0], function, arguments, keywords, keywords.get("non_blocking", False))
        if any(map(on_device, tensors)):
            self._together(name, function, tensors)
            if str(function).split(".", 1)[1] in WITHIN and on_device(arguments[-1]):
                self.wait(name)
                if self.answer is None:
                    raise DeviceError(f"{name}: the operator reads a number of the device")
            if name in READING or (name in BY_MASK and _by_mask(*arguments[1:3])):
                self.wait(name)
                if name != "_local_scalar_dense" or self.answer is None:
                    raise DeviceError(f"{name}: the host waits for what is on the device")
                return torch.tensor(self.answer, dtype=tensors[0].dtype).tolist()
        return function(*arguments, **keywords)

    def _copied(
        self, target: Tensor | None, source: Tensor, function: Any, arguments: Any, keywords: Any, non_blocking: bool = False
    ) -> Any:
        device = keywords.get("device")
        there = on_device(target if target is not None else source) if device is None else device.type == "meta"
        if there and not on_device(source) and not (non_blocking and self.is_pinned(source)) and (target is None or source.dim()):
            self.wait("copy of memory that is not pinned")
        if there or not on_device(source):
            return function(*arguments, **keywords)
        if target is not None and non_blocking and self.is_pinned(target):
            return target
        self.wait("copy to the host")
        if self.answer is None:
            raise DeviceError(f"the host reads {tuple(source.shape)} of the device")
        found = torch.full(source.shape, self.answer, dtype=keywords.get("dtype") or source.dtype)
        return found if target is None else target.copy_(found)

    def _together(self, name: str, function: Any, tensors: list[Tensor]) -> None:
        elementwise = torch.Tag.pointwise in function.tags or name.startswith(WITH_NUMBERS)
        for one in tensors:
            if on_device(one) or (elementwise and not one.dim()):
                continue
            if name in (*BY_MASK, "_unsafe_index", "_index_put_impl_") and not one.is_floating_point():
                self.wait("copy of an index")
                continue
            where = ", ".join(f"{tuple(each.shape)} on {'cuda' if on_device(each) else 'cpu'}" for each in tensors)
            raise DeviceError(f"{name}: operands on different devices: {where}")
        types = {one.dtype for one in tensors if one.is_floating_point()}
        if name.rstrip("_") in ONE_TYPE and len(types) > 1:
            raise DeviceError(f"{name}: operands of different types: {', '.join(sorted(map(str, types)))}")


class Questions(TorchFunctionMode):
    """Answers what Python code asks a tensor about its device, and takes the device that it names."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators, self.wait = operators, operators.wait

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        if function in ANSWERS and len(arguments) == 1 and on_device(arguments[0]):
            return ANSWERS[function](arguments[0])
        if function == torch.Tensor.data.__set__ and on_device(arguments[0]) != on_device(arguments[1]):
            moved = arguments[1].data.requires_grad_(arguments[0].requires_grad)  # meta tensors refuse what CUDA's do not
            return torch._C._swap_tensor_impl(arguments[0], moved)
        if function is torch.Tensor.pin_memory:
            if on_device(arguments[0]):
                raise DeviceError("pin_memory: memory of the device cannot be pinned")
            return arguments[0] if self.operators.is_pinned(arguments[0]) else self.operators.pin(arguments[0].clone())
        if function is torch.Tensor.is_pinned:
            return self.operators.is_pinned(arguments[0])
        if keywords.pop("pin_memory", False):
            return self.operators.pin(function(*arguments, **keywords))
        if function is torch.Tensor.cuda:
            function, arguments = torch.Tensor.to, (arguments[0], DEVICE, *arguments[2:])
        if function is torch.Tensor.to:
            arguments = tuple(_taken(one) if isinstance(one, (str, torch.device)) else one for one in arguments)
        if "device" in keywords:
            keywords["device"] = _taken(keywords["device"])
            if function in (torch.tensor, torch.as_tensor) and keywords["device"] == torch.device("meta"):
                self.wait("copy of memory that is not pinned")
        return function(*arguments, **keywords)


TYPES = {torch.float32: "FloatTensor", torch.bfloat16: "BFloat16Tensor", torch.int64: "LongTensor"}
ANSWERS: dict[Any, Any] = {
    torch.Tensor.device.__get__: lambda tensor: DEVICE,
    torch.Tensor.is_cuda.__get__: lambda tensor: True,
    torch.Tensor.is_meta.__get__: lambda tensor: False,
    torch.Tensor.type: lambda tensor: f"torch.cuda.{TYPES[tensor.dtype]}",
    torch.Tensor.get_device: lambda tensor: DEVICE.index,
}


PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)


class Stream:
    """A stream, or an event of one, whose work is done."""

    def __init__(self, *unused: Any, **also_unused: Any) -> None:
        pass

    def nothing(self, *unused: Any) -> Stream:
        return self

    wait_stream = wait_event = wait = record = record_event = query = nothing


def on_device(tensor: Tensor) -> bool:
    return tensor.device.type in ("meta", "cuda")


def _taken(device: Any) -> Any:
    """Where the tensors of "cuda" really are; any other device as it is."""
    return torch.device("meta") if isinstance(device, int) or torch.device(device or "cpu").type == "cuda" else device


@contextmanager
def fake_cuda(answer: float | None = None) -> Iterator[Operators]:
    """The device, in this thread; see the module's docstring."""
    operators = Operators(answer)
    questions, backward = Questions(operators), torch.autograd._engine_run_backward

    def asked(*arguments: Any, **keywords: Any) -> Any:
        with questions:  # which is not there within a function that it was asked about, such as `Tensor.backward`
            return backward(*arguments, **keywords)

    def synchronised(*unused: Any) -> None:
        operators.wait("synchronize")

    stream = type("Stream", (Stream,), {"synchronize": synchronised})
    driver: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "is_bf16_supported": lambda: True,
        **{name: lambda *unused: 0 for name in ("memory_allocated", "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats")},
        "current_device": lambda: DEVICE.index,
        "set_device": lambda device: None,
        "device": nullcontext,
        "synchronize": synchronised,
        "max_memory_allocated": lambda device=None: 0,
        "Stream": stream,
        "Event": stream,
        "stream": nullcontext,
        "current_stream": stream,
        "default_stream": stream,
    }
    with ExitStack() as stack:
        for name, stand_in in driver.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.multiple(torch.cuda.nvtx, range_push=lambda *unused: 0, range_pop=lambda *unused: 0))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", asked))
        stack.enter_context(mock.patch.object(torch, "_has_compatible_shallow_copy_type", lambda tensor, other: True))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        # Operators keep tensors for the backward where nobody is asked.
        checks = {"default": lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}}
        stack.enter_context(mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, checks))
        stack.callback(forget_masks)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(operators)
        stack.enter_context(questions)
        yield operators


def forget_masks() -> None:
    """Let go of masks that were made without data: others must not find them."""
    for cached in vars(kernels).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
