"""One block of a model, taken apart at run time: its queries, keys and values, and what it does with given contexts.

No table of families: projections are captured where the block calls the attention interface, and the rest of the block
is run by returning given contexts from that call. What the closed forms of LIG assume (keys and values are linear maps
of the block's input, or of its layer norm) is checked with a probe and refused by name where it does not hold.

Shapes: T positions, D width, H heads, d width of a head, R runs of the block at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from calig.pipeline.attribution.attention import eager_function, implementation
from calig.pipeline.attribution.model import ExplainableModel, Inputs, UnsupportedModelError
from calig.pipeline.attribution.wrapping import replaced
from calig.pipeline.errors import InputError

INTERFACE = "calig_within_block"
_AGREES = 1e-3  # a probe that fails is off by the size of the numbers themselves


class Projections(NamedTuple):
    """What the attention of a block is called with, for R runs.

    Attributes:
        query: (R, H, T, d).
        key: (R, H, T, d), shared heads repeated.
        value: (R, H, T, d), likewise.
        mask: (1 or H, T, T) added to the scores; of each head its own where a family has position biases.
        scale: Of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    scale: float


_Watch = Callable[[Tensor, Tensor], None]
AttentionHandler = Callable[..., tuple[Tensor, Tensor | None]]
_handler: ContextVar[AttentionHandler | None] = ContextVar("calig_within_block", default=None)


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    handler = _handler.get()
    return (eager_function(module) if handler is None else handler)(module, *args, **kwargs)


AttentionInterface.register(INTERFACE, _attend)
AttentionMaskInterface.register(INTERFACE, eager_mask)


@contextmanager
def attention_calls(host: PreTrainedModel, handler: AttentionHandler) -> Iterator[None]:
    """Within the context, every attention call of the model is the handler's."""
    token = _handler.set(handler)
    try:
        with implementation(host, INTERFACE):
            yield
    finally:
        _handler.reset(token)


class _Captured(Exception):
    """Ends a run of a block once its projections are known."""


@dataclass
class Block:
    """One block call on one example.

    Attributes:
        module: The block.
        host: The Hugging Face model around it.
        family: Its name, for messages.
        args: What the call was given beside the states.
        kwargs: Likewise.
        states: (T, D) z, what enters the block.
        output: (T, D) z', what leaves it.
        projections: Of the call, with R = 1.
        real: (T,) true on real positions: padding on the left is still there.
    """

    module: nn.Module
    host: PreTrainedModel
    family: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: Tensor
    output: Tensor
    projections: Projections
    real: Tensor

    def __post_init__(self) -> None:
        self._before: list[nn.Module] = []  # linear maps in front of the attention call: not needed to run the rest
        self._between: list[nn.Module] = []  # those from there to the next norm: not needed to run the MLP part
        self._norms_before: list[nn.Module] = []
        self._norm_after: nn.Module | None = None
        self._find_parts()

    # ------------------------------------------------------------------------------------------------ running it

    def project(self, states: Tensor) -> Projections:
        """Queries, keys and values of (R, T, D) other states at the same positions."""
        found: list[Projections] = []

        def capture(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            found.append(_projections(module, *args, **kwargs))
            raise _Captured

        with attention_calls(self.host, capture), suppress(_Captured):
            self._call(states)
        return found[0]

    def rest(
        self, states: Tensor, contexts: Tensor, *, watch: Callable[[Tensor, Tensor], None] | None = None
    ) -> Tensor:
        """Run the block behind its attention: output projection, residual, norms and MLP.

        Args:
            states: (R, T, D) what the residual path carries.
            contexts: (R, T, H, d) what attention returns.
            watch: Called with input and output of the first norm behind attention.

        Returns:
            (R, T, D) in the graph of both.
        """

        def give(_module: nn.Module, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
            return contexts, None

        with ExitStack() as stack:
            stack.enter_context(attention_calls(self.host, give))
            for module in self._before:
                stack.enter_context(replaced(module, _zeros_like_output_of(module)))
            if watch is not None and self._norm_after is not None:
                handle = self._norm_after.register_forward_hook(lambda _m, args, output: watch(args[0], output))
                stack.callback(handle.remove)
            return self._call(states)

    def rest_from_middle(self, middle: Tensor) -> Tensor:
        """Run the MLP part alone: (R, T, D) from u (R, T, D), what enters it (`middle` holds the block's own)."""
        _, heads, _, width = self.projections.value.shape
        contexts = middle.new_zeros(*middle.shape[:2], heads, width)
        if self.norm is None:  # post-norm: u is what the norm behind attention returns
            assert self._norm_after is not None
            with ExitStack() as stack:
                for module in self._between:
                    stack.enter_context(replaced(module, _zeros_like_output_of(module)))
                stack.enter_context(replaced(self._norm_after, lambda *_args, **_kwargs: middle))
                return self.rest(torch.zeros_like(middle), contexts)
        # Pre-norm: u is on the residual path, to which attention that returns zeros adds its bias alone.
        bias = self.middle(self.contexts[None] * 0)[0] - self.states
        return self.rest(middle - bias, contexts)

    def middle(self, contexts: Tensor) -> Tensor:
        """u, what enters the MLP part, for (R, T, H, d) contexts and the block's own residual: (R, T, D).

        Raises:
            UnsupportedModelError: The block has no MLP part of its own behind attention (the two run side by side).
        """
        seen: list[Tensor] = []

        def watch(given: Tensor, returned: Tensor) -> None:
            seen.append(returned if self.norm is None else given)
            raise _Captured

        with suppress(_Captured):
            self.rest(self.states.expand(len(contexts), -1, -1), contexts, watch=watch)
        if not seen or seen[0].shape != (len(contexts), *self.states.shape):
            raise self._no_middle()
        return seen[0]

    def check_middle(self, output: Tensor) -> None:
        """Raise UnsupportedModelError unless the MLP part alone has made of u (T, D) what the block does.

        Args:
            output: (T, D) what `rest_from_middle` gave for the block's own u.
        """
        if not self._agree(output, self.output):
            raise self._no_middle()

    def _no_middle(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"a block of '{self.family}' is not attention followed by an MLP part of its own, so composition='slices' "
            "has nothing to cut; take composition='heads'."
        )

    def _call(self, states: Tensor) -> Tensor:
        result = self.module(states, *self.args, **self.kwargs)
        return result[0] if isinstance(result, tuple) else result

    # --------------------------------------------------------------------------------------------- what it is

    @property
    def contexts(self) -> Tensor:
        """(T, H, d) what attention returns in the ordinary pass."""
        return (self.probabilities @ self.projections.value[0]).transpose(0, 1)

    @property
    def probabilities(self) -> Tensor:
        """(H, T, T) attention of the ordinary pass, row = query."""
        query, key, _, mask, scale = self.projections
        return (query[0] @ key[0].transpose(-1, -2) * scale + mask).softmax(-1)

    @property
    def norm(self) -> Norm | None:
        """The layer norm in front of the projections; None for post-norm blocks, whose projections see z itself."""
        return self._norm

    @torch.no_grad()
    def _find_parts(self) -> None:
        """Order the block's parts by a run, and check that its projections are what the closed forms take them for."""
        attended = False

        def note(module: nn.Module, _args: Any, _output: Any) -> None:
            is_norm = type(module).__name__.endswith("Norm")
            if not attended:
                (self._norms_before if is_norm else self._before).append(module)
            elif is_norm and self._norm_after is None:
                self._norm_after = module
            elif self._norm_after is None:
                self._between.append(module)

        def pass_on(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            nonlocal attended
            attended = True
            return eager_function(module)(module, *args, **kwargs)

        with ExitStack() as stack:
            for module in self.module.modules():
                own = next(module.parameters(recurse=False), None)
                if own is not None and next(module.children(), None) is None:
                    stack.callback(module.register_forward_hook(note).remove)
            stack.enter_context(attention_calls(self.host, pass_on))
            again = self._call(self.states[None])[0]
        self._before, self._between = (
            [module for module in found if _width(module) is not None] for found in (self._before, self._between)
        )
        if not self._agree(self.rest(self.states[None], self.contexts[None])[0], again):
            raise UnsupportedModelError(
                f"the attention of '{self.family}' is not a softmax of scaled dot products and a mask, or its block "
                "does more with the input than project it; lig does not work on it."
            )
        self._norm = self._check_projections()

    def _agree(self, one: Tensor, other: Tensor) -> bool:
        # A row of padding that may look nowhere holds anything.
        return _close(one[self.real], other[self.real])

    def _check_projections(self) -> Norm | None:
        rolled = self.states.roll(1, 0)
        middle = (self.states + rolled) / 2
        runs = torch.stack([self.states, rolled, middle, torch.zeros_like(self.states)])
        found = self.project(runs)
        for maps in (found.key, found.value):
            if not _close(maps[2], (maps[0] + maps[1]) / 2):
                break
        else:
            return None
        for norm in _candidates(self._norms_before):
            sigma = [norm.deviation(states)[:, None] for states in runs[:3]]
            if all(
                _close(
                    (maps[2] - maps[3]) * sigma[2],
                    ((maps[0] - maps[3]) * sigma[0] + (maps[1] - maps[3]) * sigma[1]) / 2,
                )
                for maps in (found.key, found.value)
            ):
                return norm
        raise UnsupportedModelError(
            f"keys and values of '{self.family}' are not linear in the block's input or in its layer norm (a norm of "
            "queries and keys, say); lig does not work on it."
        )


class Norm(NamedTuple):
    """A layer norm in front of the projections: `(z - mean) / deviation`, the mean taken off or not (RMS norm).

    Attributes:
        centred: Whether the mean is taken off.
        epsilon: Added to the variance.
    """

    centred: bool
    epsilon: float

    def centre(self, states: Tensor) -> Tensor:
        """What the deviation divides, (..., D)."""
        return states - states.mean(-1, keepdim=True) if self.centred else states

    def deviation(self, states: Tensor) -> Tensor:
        """(...,) from (..., D)."""
        return (self.centre(states).square().mean(-1) + self.epsilon).sqrt()


def take_apart(model: ExplainableModel, inputs: Inputs, row: int) -> list[Block]:
    """Run one example and return its blocks in the order of their calls.

    Padding on the right is cut off first: T is the example's own length there.

    Args:
        model: In an open session.
        inputs: B examples.
        row: Which of them.

    Raises:
        UnsupportedModelError: The family does not use the attention interface, or its blocks are of another kind.
    """
    host = model.require_interface()
    real = inputs.mask[row].nonzero()
    if not len(real):
        raise InputError(f"example {row} of the batch is nothing but padding.")
    length = int(real.max()) + 1
    width = inputs.mask.shape[1]
    batch = {
        key: value[:, :length] if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == width else value
        for key, value in inputs.select(torch.tensor([row], device=inputs.mask.device)).items()
    }
    attended: list[Projections] = []
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def capture(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        attended.append(_projections(module, *args, **kwargs))
        return eager_function(module)(module, *args, **kwargs)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append((module, args[1:], {key: _without_cache(key, value) for key, value in rest.items()}))

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(attention_calls(host, capture))
        for module in dict.fromkeys(model.structure.blocks):
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        trace = model.trace(batch)
    if len(attended) != len(calls):
        raise UnsupportedModelError(
            f"'{model.structure.family}' has {len(calls)} blocks but {len(attended)} attention calls; "
            "lig needs one each."
        )
    blocks = []
    for layer, ((module, args, kwargs), projections) in enumerate(zip(calls, attended, strict=True)):
        states, output = trace.states[layer], trace.states[layer + 1]
        assert states is not None and output is not None  # the pass started at the embedding
        args = tuple(_without_cache("", value) for value in args)
        blocks.append(
            Block(
                module,
                host,
                model.structure.family,
                args,
                kwargs,
                states[0].detach(),
                output[0].detach(),
                projections,
                inputs.mask[row, :length],
            )
        )
    return blocks


def _projections(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Projections:
    groups = query.shape[1] // key.shape[1]
    key, value = (part.detach().repeat_interleave(groups, dim=1) for part in (key, value))
    length = query.shape[2]
    mask = torch.zeros(1, length, length, dtype=query.dtype, device=query.device)
    if attention_mask is not None:
        # (1 or R, 1 or H, T, T): the same for all runs of one example.
        added = attention_mask[0, ..., :length]
        mask = torch.where(added, 0.0, torch.finfo(query.dtype).min) if added.dtype == torch.bool else added
    scale = kwargs.get("scaling")
    return Projections(query.detach(), key, value, mask, query.shape[-1] ** -0.5 if scale is None else float(scale))


def _without_cache(key: str, value: Any) -> Any:
    # A cache would grow with every further run of the block.
    if key == "use_cache":
        return False
    return None if type(value).__name__.endswith("Cache") else value


def _candidates(norms: list[nn.Module]) -> Iterator[Norm]:
    """The norms that the one in front of the projections may be, most likely first."""
    for module in norms:
        epsilon = next((float(getattr(module, name)) for name in _EPSILONS if hasattr(module, name)), 0.0)
        centred = isinstance(module, nn.LayerNorm)
        yield from (Norm(centred, epsilon), Norm(not centred, epsilon))


_EPSILONS = ("eps", "variance_epsilon", "epsilon")


def _width(module: nn.Module) -> int | None:
    """Output width of a linear map, None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return getattr(module, "nf", None)  # transformers' Conv1D


def _zeros_like_output_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    width = _width(module)
    assert width is not None  # others are not replaced
    return lambda given: given.new_zeros(*given.shape[:-1], width)


def _close(one: Tensor, other: Tensor) -> bool:
    limit = max(_AGREES, 16 * torch.finfo(other.dtype).eps)  # the eps counts where precision="model" keeps 16 bits
    return bool((one - other).abs().max() <= limit * other.abs().max().clamp_min(1e-6))
