"""Whether work on several CUDA streams is in order, found out on a CPU: who reads what whom has waited for.

`Streams` takes the place of PyTorch's streams and follows every op and every interpreted kernel. It knows which stream
each would run on (a backward pass runs where its forward pass ran, and waits for what it gets) and, by vector clocks,
what that stream has waited for. It complains where

- a tensor is read or written that another stream may still be writing, or written that another may still be reading;
- memory is taken by the stream whose it was, which PyTorch's allocator allows at once when the last tensor is gone,
  while another stream may still be using it.

All that a kernel changes it writes, all else that it is given it reads. A gradient that autograd hands from one op to
another's stream keeps its memory, for autograd tells the allocator. Its own sums of gradients are counted to the op
whose gradient comes last.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor
from triton.tools.tensor_descriptor import TensorDescriptor

Clock = dict[int, int]  # of each stream, how many of its ops are known to be done


@dataclass(eq=False)
class Stream:
    """What `Beside` asks of a CUDA stream."""

    name: str
    number: int
    clock: Clock = field(default_factory=dict)
    device = torch.device("cpu")

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Clock:
        return dict(self.clock)

    def wait_event(self, done: Clock) -> None:
        for number, count in done.items():
            self.clock[number] = max(self.clock.get(number, 0), count)


@dataclass
class _Memory:
    """A storage: whose it is, and where in each stream's order it was last read and written, by what."""

    alive: StorageWeakRef
    home: Stream
    made: str
    node: object  # of the backward pass that made it
    reads: dict[int, tuple[int, str]] = field(default_factory=dict)
    writes: dict[int, tuple[int, str]] = field(default_factory=dict)


class Streams:
    """The streams of a test, of which `main` is the current one at first; `races` is what was found."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.main = self.stream("main")
        self.races: list[str] = []
        self.ops: dict[str, int] = defaultdict(int)  # on each stream
        self._memory: dict[int, _Memory] = {}
        self._stack: list[tuple[object, Stream]] = []
        self._node: Any = None
        self._start: Clock = {}  # what the caller of the backward pass had done
        self._streams: dict[object, Stream] = {}  # of autograd's nodes
        self._known: dict[object, list[Clock]] = defaultdict(list)  # what a node's stream will have waited for
        self._quiet = False

    def stream(self, name: str) -> Stream:
        return Stream(name, next(self._numbers))

    def current(self, device: object = None) -> Stream:
        node = self._entered()
        if self._stack and self._stack[-1][0] is node:
            return self._stack[-1][1]
        return self.main if node is None else self._own(node)

    def _own(self, node: object) -> Stream:
        return self._streams.get(node, self.main)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self._stack.append((self._entered(), stream))
        try:
            yield
        finally:
            self._stack.pop()

    @contextlib.contextmanager
    def watched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Follows what is done within."""
        apply = torch.autograd.Function.apply

        def applied(function: Any, *values: Any) -> Any:
            stream = self.current()
            result = apply.__func__(function, *values)  # type: ignore[attr-defined]
            self._made(result, stream)
            return result

        launch = GridExecutor.__call__

        def launched(executor: Any, *values: Any, **options: Any) -> None:
            self._launched(lambda: launch(executor, *values, **options), [*values, *options.values()], executor.fn)

        with monkeypatch.context() as patch, _Functions(self), _Ops(self):
            patch.setattr(torch.autograd.Function, "apply", classmethod(applied))
            patch.setattr(GridExecutor, "__call__", launched)
            patch.setattr(torch.cuda, "current_stream", self.current)
            patch.setattr(torch.cuda, "stream", self.on)
            yield

    def uses(self, tensors: list[Tensor], what: str, writes: bool = False) -> None:
        """What the current stream does next, out of this one's sight."""
        stream = self._next()
        for one in tensors:
            self._access(stream, one, what, writes)

    def _entered(self) -> Any:
        """The node whose backward pass this is, whose stream has waited for those that its gradients come from."""
        node = torch._C._current_autograd_node()
        if node is self._node:
            return node
        before, self._node = self._node, node
        if before is not None:
            self._left(before)
        if node is not None:
            stream = self._streams.setdefault(node, self.main)
            if before is None:  # a backward pass begins behind what its caller has done
                self._start = self.main.record_event()
            stream.wait_event(self._start)
            for known in self._known.pop(node, []):
                stream.wait_event(known)
        return node

    def _left(self, node: Any) -> None:
        """All nodes that depend on this one come after it."""
        done = self._own(node).record_event()
        ahead, seen = [one for one, _ in node.next_functions if one is not None], set()
        while ahead:
            one = ahead.pop()
            if one not in seen:
                seen.add(one)
                self._known[one].append(done)
                ahead += [other for other, _ in one.next_functions if other is not None]

    def _made(self, result: Any, stream: Stream) -> None:
        """The nodes of a forward pass's results, and of what led to them, ran on `stream` unless it is known better."""
        ahead = [one.grad_fn for one in tree_leaves(result) if isinstance(one, Tensor) and one.grad_fn is not None]
        while ahead:
            node = ahead.pop()
            if node not in self._streams:
                self._streams[node] = self.main if node.name() == "torch::autograd::AccumulateGrad" else stream
                ahead += [one for one, _ in node.next_functions if one is not None]

    def _next(self) -> Stream:
        stream = self.current()
        stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        self.ops[stream.name] += 1
        return stream

    def _of(self, tensor: Tensor, stream: Stream, made: str | None) -> _Memory:
        """The tensor's memory; where it was unknown `stream` has taken it, if `made` says how."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._memory.get(key)
        if known is not None and not known.alive.expired():
            return known
        if made is not None:
            self._taken(stream, made)
        home = stream if made is not None else self.main
        self._memory[key] = _Memory(StorageWeakRef(storage), home, made or "before", self._node)
        return self._memory[key]

    def _taken(self, stream: Stream, what: str) -> None:
        """Memory of `stream` is reused, perhaps any that was given back."""
        for key, memory in list(self._memory.items()):
            if memory.home is stream and memory.alive.expired():
                del self._memory[key]
                for number, (count, use) in (memory.reads | memory.writes).items():
                    if stream.clock.get(number, 0) < count:
                        self._found(f"{what} on {stream.name} may take the memory of {memory.made}, in use by {use}")

    def _access(self, stream: Stream, tensor: Tensor, what: str, writes: bool, made: str | None = None) -> None:
        memory = self._of(tensor, stream, made)
        for uses, kind in ((memory.writes, "written"), (memory.reads if writes else {}, "read")):
            for number, (count, use) in uses.items():
                if number != stream.number and stream.clock.get(number, 0) < count:
                    does = "writes" if writes else "reads"
                    self._found(f"{what} on {stream.name} {does} what may be being {kind} by {use} ({memory.made})")
        (memory.writes if writes else memory.reads)[stream.number] = stream.clock[stream.number], what
        if self._node is not None and memory.node not in (None, self._node) and stream is self._own(self._node):
            memory.home = stream  # handed on

    def _found(self, race: str) -> None:
        where = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in traceback.extract_stack()[-40:]]
        shown = [one for one in where if not one.startswith(("streams", "_", "contextlib", "function"))]
        self.races.append(f"{race} [{' '.join(shown[-4:])}]")

    def _launched(self, launch: Callable[[], None], values: list[Any], function: Any) -> None:
        given = [one.base if isinstance(one, TensorDescriptor) else one for one in values]
        tensors = [one for one in given if isinstance(one, Tensor)]
        self._quiet = True
        try:
            before = [_bytes(one) for one in tensors]
            launch()
            changed = [not torch.equal(_bytes(one), was) for one, was in zip(tensors, before, strict=True)]
        finally:
            self._quiet = False
        stream = self._next()
        for one, writes in zip(tensors, changed, strict=True):
            self._access(stream, one, function.__name__, writes)

    def _done(self, op: Any, values: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        arguments = list(zip(op._schema.arguments, values, strict=False))
        arguments += [(one, options[one.name]) for one in op._schema.arguments if one.name in options]
        given = [
            (tensor, argument.alias_info is not None and argument.alias_info.is_write)
            for argument, value in arguments
            for tensor in tree_leaves(value)
            if isinstance(tensor, Tensor)
        ]
        storages = {one.untyped_storage()._cdata for one, _ in given}
        fresh = [one for one in outputs if one.untyped_storage()._cdata not in storages]
        if given and not fresh and not any(writes for _, writes in given) and outputs:
            return  # a view
        name = str(op)
        stream = self._next()
        for tensor, writes in given:
            self._access(stream, tensor, name, writes)
        for one in fresh:
            if "empty" in name:
                self._of(one, stream, name)
            else:
                self._access(stream, one, name, True, made=name)


def _bytes(tensor: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return whole.clone()


class _Ops(TorchDispatchMode):
    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, op: Any, types: Any, values: Any = (), options: Any = None) -> Any:
        options = options or {}
        result = op(*values, **options)
        if not self._streams._quiet:
            self._streams._done(op, values, options, result)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_function__(self, function: Any, types: Any, values: Any = (), options: Any = None) -> Any:
        stream = self._streams.current()
        result = function(*values, **(options or {}))
        self._streams._made(result, stream)
        return result
