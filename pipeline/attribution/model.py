"""The live model with its inside laid open: states between the blocks, attention maps, and the tail behind a layer.

Shapes: B examples, N rows of one internal pass (a path puts many nodes of an example into one), T tokens, D width,
H heads, L blocks.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.attention import recorded_attention, uses_attention_interface
from calig.pipeline.attribution.budget import TokenBudget
from calig.pipeline.attribution.entry import entry_of, fixed_positions, state_name, state_of
from calig.pipeline.attribution.inputs import Inputs
from calig.pipeline.attribution.precision import coarse_types, float32_copies
from calig.pipeline.attribution.structure import Blocks, Structure, UnsupportedModelError, find_structure
from calig.pipeline.attribution.windows import Pooling, windows_in
from calig.pipeline.attribution.wrapping import refuse_prompt_tuning, suspended, unwrap
from calig.pipeline.errors import InputError

__all__ = ["ExplainableModel", "Inputs", "Trace", "UnsupportedModelError"]


@dataclass
class Trace:
    """One traced pass of N rows.

    Attributes:
        output: What the model's forward returned.
        states: (N, T, D) each: `states[l]` is z^l, from the layer where the pass started; those before are None.
        attentions: (N, H, T, T) each, in call order; empty unless recorded.
    """

    output: Any = None
    states: list[Tensor | None] = field(default_factory=list)
    attentions: list[Tensor] = field(default_factory=list)

    def state(self, layer: int) -> Tensor:
        """z^layer; raises ValueError for a layer in front of the pass's start."""
        found = self.states[layer]
        if found is None:
            raise ValueError(f"the pass starts behind layer {layer}")
        return found


def forward_inputs(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model's forward takes, without the labels (a loss is nobody's business here)."""
    # A wrapper's signature (PEFT's, say) leaves out what it hands through.
    parameters = inspect.signature(unwrap(module).forward).parameters
    names = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    # A forward that is nothing but *args, **kwargs says nothing about what it takes.
    takes_all = not names - {"args", "self"}
    return {key: value for key, value in batch.items() if key != "labels" and (takes_all or key in names)}


def _given_special(mask: Tensor | None, batch: Mapping[str, Any], real: Tensor) -> Tensor | None:
    """(B, T) the special tokens that the caller named, by argument or in the batch; None if not."""
    given = batch.get("special_tokens_mask") if mask is None else mask
    if given is None:
        return None
    if given.shape != real.shape:
        raise InputError(f"special_tokens_mask has shape {tuple(given.shape)}; expected (B, T), {tuple(real.shape)}.")
    return given.detach().clone().to(real.device).bool()


def _without_attention() -> str:
    from calig.pipeline.attribution.methods import available_methods, method_class

    return ", ".join(name for name in available_methods() if not method_class(name).needs_attention)


class ExplainableModel:
    """Wraps a live model; it is never copied, converted or left changed.

    Args:
        model: A Hugging Face model, or any module whose blocks are an `nn.ModuleList` of one type and take the states
            as their first argument. Wrappers around it (DistributedDataParallel, torch.compile, PEFT) are looked
            through, compiled and checkpointed parts run plainly while it is explained.
        tokenizer: Names the special tokens and the `mask` and `unk` baselines; for images the image processor, which
            says what black and the mean colour are after normalisation. Optional.
        max_tokens_per_pass: Rows times tokens of one internal pass: the memory budget, which does not change results.
            "auto" halves it where memory runs out, and remembers.
        precision: "float32" explains a model of 16-bit parameters through float32 copies of them that live as long as
            a session, because in 16 bits completeness gaps and error bounds are rounding noise; "model" runs it as it
            is. Autocast is off in either.
        blocks: Where the blocks are, where they are not found or others are meant: the dotted path of their container
            (`"encoder.layers"`), or the modules in order.
        embedding: The word embedding, likewise: its dotted path, or the module.

    Raises:
        InputError: A budget or precision that does not exist.
        UnsupportedModelError: The blocks cannot be found, or an adapter adds positions to the input.
        InputError: `blocks` or `embedding` name nothing in the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        max_tokens_per_pass: int | Literal["auto"] = "auto",
        precision: Literal["float32", "model"] = "float32",
        blocks: Blocks | None = None,
        embedding: str | nn.Module | None = None,
    ) -> None:
        refuse_prompt_tuning(model)
        if precision not in ("float32", "model"):
            raise InputError(f"precision takes 'float32' or 'model', got {precision!r}.")
        self.module = unwrap(model)
        self.tokenizer = tokenizer
        self.precision = precision
        self.structure: Structure = find_structure(self.module, blocks=blocks, embedding=embedding)
        self.budget = TokenBudget(max_tokens_per_pass, self.device)
        self.cuts: set[int] = set()
        """Layers whose state was seen to be all that the rest of the network sees (`require_cuts`)."""
        self._depth: int | None = None
        self._rest: tuple[None, ...] | None = None  # what a block returns beside its state; None: the bare state
        self._tokens_first = False
        self._kept_widths: dict[int, bool] = {}
        self._fixed: dict[tuple[int, ...], Tensor] = {}
        self._has_interface: bool | None = None
        self._warned_of_left_padding = False
        self._warned_of_precision = False

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.module.parameters()).device

    @property
    def depth(self) -> int:
        """L, the number of block calls in a forward pass; known after the first traced pass."""
        if self._depth is None:
            raise RuntimeError("the number of blocks is known after the first traced pass")
        return self._depth

    @contextmanager
    def evaluation(self) -> Iterator[ExplainableModel]:
        """Evaluation mode, nothing compiled or checkpointed, autocast off; all is back afterwards, also on failure."""
        training = [module for module in self.module.modules() if module.training]
        try:
            # Flags are set one by one: `.eval()` and `.train()` may be overridden and do more than set flags.
            for module in training:
                module.training = False
            with suspended(self.module), torch.autocast(self.device.type, enabled=False):
                yield self
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def session(self) -> Iterator[ExplainableModel]:
        """What the engine works in: `evaluation`, with gradients on, also under `no_grad` and `inference_mode`."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if self.precision == "float32":
                stack.enter_context(float32_copies(self.module))
            else:
                self._warn_of_precision()
            stack.enter_context(self.evaluation())
            yield self

    def _warn_of_precision(self) -> None:
        coarse = coarse_types(self.module)
        if coarse and not self._warned_of_precision:
            self._warned_of_precision = True
            warnings.warn(
                f"the model's parameters are {', '.join(map(str, coarse))}: completeness gaps and error bounds are "
                "rounding noise at this precision, and steps='auto' will not converge. Take precision='float32'.",
                stacklevel=3,
            )

    def with_tokenizer(self, tokenizer: Any) -> ExplainableModel:
        """The same live model with another tokenizer."""
        other = ExplainableModel(
            self.module,
            tokenizer=tokenizer,
            precision=self.precision,
            blocks=self.structure.blocks,
            embedding=self.structure.embedding,
        )
        other.budget = self.budget
        return other

    # ------------------------------------------------------------------------------------------------ inputs

    def prepare(
        self, batch: Mapping[str, Any], special_tokens_mask: Tensor | None = None, pooling: Pooling | None = None
    ) -> Inputs:
        """Clone a batch for the engine and find its real and special positions, in an open session.

        Args:
            batch: What the model's forward takes; keys it does not take are left out. `labels` are left out too. Every
                tensor whose first size is B holds one entry per example. `attention_mask` (B, T) names the real
                positions even if the forward of a plain module does not take it; without one all are real.
            special_tokens_mask: (B, T) 1 on special tokens; else the tokenizer's, else the model config's ids decide;
                of images, the positions that do not depend on the pixels.
            pooling: Of a batch with `windows` (see `Windows`): how their outputs become that of the document; by
                default what the model's config says.

        Raises:
            InputError: Neither text nor images nor any tensor, a mask of another shape, or windows that do not fit.
            UnsupportedModelError: The blocks work on other positions than the batch has.
        """
        kept = {
            key: self._own(value) if isinstance(value, Tensor) else value
            for key, value in forward_inputs(self.module, batch).items()
        }
        ids = kept.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return self._prepare_other(kept, batch, special_tokens_mask)
        pad = getattr(self.structure.config, "pad_token_id", None)
        mask = kept.get("attention_mask", torch.ones_like(ids)).bool()
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}.")
        if (~mask[:, 0] & mask.any(dim=1)).any() and not self._warned_of_left_padding:
            self._warned_of_left_padding = True
            warnings.warn(
                f"the batch is padded on the left. Attributions of '{self.structure.family}' then only mean something "
                "if its logits do not depend on the side; else set tokenizer.padding_side = 'right'.",
                stacklevel=3,
            )
        special = _given_special(special_tokens_mask, batch, mask)
        if special is None:
            known = [*self._special_ids(), *([pad] if isinstance(pad, int) else [])]
            special = torch.isin(ids, torch.tensor(known, device=ids.device, dtype=ids.dtype))
        windows = windows_in(batch, mask, self.structure.config, pooling)
        inputs = read = Inputs(kept, mask, special & mask, windows=windows)
        if windows is not None:
            read = windows.inputs(inputs)
        first, width = torch.zeros(1, dtype=torch.long, device=ids.device), read.mask.shape[1]
        (found,) = self.budget.run(first, width, lambda row: self._entry_tokens(read.select(row)).shape[1])
        if found != width:
            raise UnsupportedModelError(
                f"the blocks of '{self.structure.family}' work on {found} positions where the batch has {width} "
                "tokens. A model that pads its input to a multiple of its window (Longformer) needs that done outside, "
                "tokenizer(..., pad_to_multiple_of=WINDOW); one that pools tokens or adds some cannot be explained."
            )
        return inputs

    def _prepare_other(
        self, kept: dict[str, Any], batch: Mapping[str, Any], special_tokens_mask: Tensor | None
    ) -> Inputs:
        """Images, and whatever else a plain module takes: the number of positions is that of the first block."""
        tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor) and value.ndim > 0}
        if not tensors:
            raise InputError(
                "the batch needs `input_ids` (B, T), `pixel_values` (B, C, H, W) or another tensor that the forward of "
                f"'{self.structure.family}' takes; it has {sorted(batch)}."
            )
        images = [key for key, value in tensors.items() if value.ndim == 4 and value.is_floating_point()]
        pixels = "pixel_values" if "pixel_values" in images else images[0] if len(images) == 1 else None
        size = len(tensors[pixels or next(iter(tensors))])
        nothing = torch.ones(size, 0, dtype=torch.bool, device=self.device)
        one = Inputs(kept, nothing, nothing).select(torch.zeros(1, dtype=torch.long, device=self.device))
        tokens = self._entry_tokens(one).shape[1]
        given = batch.get("attention_mask")
        mask = torch.ones(size, tokens, dtype=torch.bool, device=self.device)
        if isinstance(given, Tensor):
            if given.shape != mask.shape:
                raise InputError(f"attention_mask has shape {tuple(given.shape)}; expected {tuple(mask.shape)}.")
            mask = given.detach().clone().to(self.device).bool()
        special = _given_special(special_tokens_mask, batch, mask)
        if special is None and pixels is not None:
            shape = tuple(one[pixels].shape)
            if shape not in self._fixed:
                self._fixed[shape] = fixed_positions(
                    lambda image: self._entry_tokens({**one, pixels: image}), one[pixels], self.structure.family
                )
            special = self._fixed[shape].expand_as(mask)
        return Inputs(kept, mask, torch.zeros_like(mask) if special is None else special & mask, pixels)

    def keeps_width(self, inputs: Inputs) -> bool:
        """Whether the blocks work on as many positions as the inputs have: asked once of every width."""
        width = inputs.mask.shape[1]
        if width not in self._kept_widths:
            one = inputs.select(torch.zeros(1, dtype=torch.long, device=self.device))
            self._kept_widths[width] = self._entry_tokens(one).shape[1] == width
        return self._kept_widths[width]

    def _entry_tokens(self, one: Mapping[str, Any]) -> Tensor:
        """(1, T, D) what enters the blocks for a batch of one; tells which of the block's axes holds the tokens."""
        entry = entry_of(self.module, self.structure, one)
        if 1 not in entry.shape[:2]:
            raise UnsupportedModelError(
                f"the blocks of '{self.structure.family}' got a tensor of shape {tuple(entry.shape)} for a batch of "
                "one; expected (1, tokens, width) or (tokens, 1, width)."
            )
        if entry.shape[:2] != (1, 1):  # one token tells nothing
            self._tokens_first = entry.shape[0] != 1
        return self._turn(entry)

    def _turn(self, state: Tensor) -> Tensor:
        """Between the engine's (N, T, D) and the block's own layout, in both directions."""
        return state.transpose(0, 1) if self._tokens_first else state

    def _own(self, value: Tensor) -> Tensor:
        copy = value.detach().clone().to(self.device)
        coarse = copy.is_floating_point() and copy.element_size() < 4
        return copy.float() if coarse and self.precision == "float32" else copy

    @property
    def names_special_tokens(self) -> bool:
        """Whether the tokenizer or the model's config names any special token."""
        return bool(self._special_ids())

    def _special_ids(self) -> list[int]:
        if hasattr(self.tokenizer, "all_special_ids"):  # an image processor has none
            return list(self.tokenizer.all_special_ids)
        config = self.structure.config
        found: list[int] = []
        for name in ("cls", "sep", "bos", "eos"):
            token = getattr(config, f"{name}_token_id", None)
            found += token if isinstance(token, list) else [token] if isinstance(token, int) else []
        return found

    # ---------------------------------------------------------------------------------------------- passes

    def trace(
        self, batch: Mapping[str, Any], *, start: int = 0, state: Tensor | None = None, attention: bool = False
    ) -> Trace:
        """Run the model and keep the states between its blocks, in the graph.

        Args:
            batch: The forward's arguments for N rows.
            start: Layer at which the pass starts: blocks up to it are not run.
            state: (N, T, D) z^start; None at `start=0` takes the model's own embedding output, cut from its past.
            attention: Also record the attention maps.

        Raises:
            UnsupportedModelError: The blocks do not hand a (N, T, D) tensor to each other, or attention maps are
                asked of a family that does not use the attention interface.
        """
        if start and state is None:
            raise ValueError("a pass that starts behind the embedding needs its state")
        trace = Trace(states=[None] * start)
        with ExitStack() as stack:
            if attention:
                trace.attentions = stack.enter_context(recorded_attention(self.require_interface()))
            stack.enter_context(self._patched_blocks(trace, start, state))
            trace.output = self.module(**batch)
        self._depth = len(trace.states) - 1
        if attention and len(trace.attentions) != self._depth:
            raise UnsupportedModelError(
                f"'{self.structure.family}' has {self._depth} blocks but recorded {len(trace.attentions)} attention "
                "maps; methods that need one map per block cannot work on it. Methods that work on it: "
                f"{_without_attention()}."
            )
        return trace

    @contextmanager
    def _patched_blocks(self, trace: Trace, start: int, state: Tensor | None) -> Iterator[None]:
        # Instance attributes shadow `forward` for the length of a pass; hooks could not skip a block's work.
        originals: list[tuple[nn.Module, Any]] = []
        calls = 0

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                call, calls = calls, calls + 1
                if call < start:
                    skipped = state_of(original, args, kwargs, self.structure)
                    if call == start - 1 and state is not None:
                        trace.states.append(state)
                        skipped = self._turn(state)
                    return skipped if self._rest is None else (skipped, *self._rest)
                if call == 0:
                    own = state_of(original, args, kwargs, self.structure)
                    entry = state if state is not None else self._turn(own).detach().requires_grad_()
                    trace.states.append(entry)
                    if args:
                        args = (self._turn(entry), *args[1:])
                    else:
                        kwargs = {**kwargs, str(state_name(original, kwargs)): self._turn(entry)}
                return self._record(trace, original(*args, **kwargs))

            return forward

        try:
            for block in dict.fromkeys(self.structure.blocks):
                originals.append((block, block.__dict__.get("forward")))
                block.forward = wrap(block.forward)
            yield
        finally:
            for block, previous in originals:
                if previous is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = previous

    def _record(self, trace: Trace, result: Any) -> Any:
        """Keep the state that a block returned; gives back what the block's caller gets."""
        several = isinstance(result, tuple | list)
        state, before = result[0] if several else result, trace.states[-1]
        expected = None if before is None else self._turn(before).shape
        if not isinstance(state, Tensor) or state.shape != expected:
            found = f"shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise UnsupportedModelError(
                f"a block of '{self.structure.family}' took states of shape {tuple(expected or ())} and returned "
                f"{found}. Attributions follow the same tokens through every layer; models that merge or pool them on "
                "the way (Swin, Funnel) cannot be explained layer by layer."
            )
        self._rest = (None,) * (len(result) - 1) if several else None
        recorded = self._turn(state)
        trace.states.append(recorded)
        if not self._tokens_first:
            return result
        # What goes on is made from what was recorded, so that the recorded state lies in the graph.
        return (self._turn(recorded), *result[1:]) if several else self._turn(recorded)

    def require_interface(self) -> Any:
        """The Hugging Face model whose attention can be recorded, or UnsupportedModelError."""
        if self._has_interface is None:
            self._has_interface = uses_attention_interface(self.structure.host)
        if not self._has_interface:
            raise UnsupportedModelError(
                f"'{self.structure.family}' does not use the attention interface of transformers, so its attention "
                f"maps cannot be recorded. Methods that work on it: {_without_attention()}."
            )
        return self.structure.host

    @property
    def max_tokens(self) -> int:
        """Rows times tokens that one internal pass may hold at present."""
        return self.budget.tokens

    @torch.no_grad()
    def logits(self, inputs: Inputs, rows: Tensor | None = None) -> Tensor:
        """(N, C) logits at the input, of all examples or of `rows` (N,), in an open session; pooled of documents."""
        from calig.pipeline.attribution.objective import logits_of

        if inputs.windows is not None:
            windows = inputs.windows if rows is None else inputs.windows.take(rows)
            return windows.pool(self.logits(windows.inputs(inputs)))
        rows = torch.arange(len(inputs), device=self.device) if rows is None else rows.to(self.device)
        width = inputs.mask.shape[1]
        return torch.cat(self.budget.run(rows, width, lambda part: logits_of(self.module(**inputs.select(part)))))

    def logits_of_batch(self, batch: Mapping[str, Any]) -> Tensor:
        """The (B, C) float32 logits of a batch as it is, in one pass: the `forward` that the metrics take."""
        from calig.pipeline.attribution.objective import logits_of

        inputs = {key: value.to(self.device) for key, value in forward_inputs(self.module, batch).items()}
        return logits_of(self.module(**inputs)).float()
