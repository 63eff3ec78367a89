"""The live model with its inside laid open: states between the blocks, attention maps, and the tail behind a layer.

Shapes: B examples, N rows of one internal pass (a path puts many nodes of an example into one), T tokens, D width,
H heads, L blocks.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.attention import recorded_attention, uses_attention_interface
from calig.pipeline.attribution.structure import Structure, UnsupportedModelError, find_structure
from calig.pipeline.attribution.wrapping import refuse_prompt_tuning, suspended, unwrap
from calig.pipeline.errors import InputError

__all__ = ["ExplainableModel", "Inputs", "Trace", "UnsupportedModelError"]


@dataclass(frozen=True)
class Inputs:
    """A batch as the engine works on it.

    Attributes:
        batch: What the model's forward takes, cloned, so that tensors made under inference mode can be used.
        mask: (B, T) true on real positions.
        special: (B, T) true on real special tokens.
    """

    batch: dict[str, Any]
    mask: Tensor
    special: Tensor

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def content(self) -> Tensor:
        """(B, T) true on real tokens that are not special: what a baseline replaces and a ranking ranks."""
        return self.mask & ~self.special

    def seed_of(self, row: int, seed: int) -> int:
        """A seed from an example's own input: the same in every batch, on every process, at every amount of padding."""
        if "input_ids" in self.batch:
            own: Any = self.batch["input_ids"][row, self.mask[row]].tolist()
        else:
            own = self.batch["pixel_values"][row].cpu().flatten().tolist()
        return int.from_bytes(hashlib.sha256(repr((seed, own)).encode()).digest()[:8], "little") >> 1

    def select(self, rows: Tensor) -> dict[str, Any]:
        """The forward's arguments for the examples `rows` (N,), which may repeat."""
        size = len(self)
        return {
            key: value[rows] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size else value
            for key, value in self.batch.items()
        }


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


def forward_inputs(module: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that a model's forward takes, without the labels (a loss is nobody's business here)."""
    # A wrapper's signature (PEFT's, say) leaves out what it hands through.
    parameters = inspect.signature(unwrap(module).forward).parameters
    names = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    # A forward that is nothing but *args, **kwargs says nothing about what it takes.
    takes_all = not names - {"args", "self"}
    return {key: value for key, value in batch.items() if key != "labels" and (takes_all or key in names)}


class ExplainableModel:
    """Wraps a live model; it is never copied, converted or left changed.

    Args:
        model: A Hugging Face model, or any module whose blocks are an `nn.ModuleList` of one type and take the states
            as their first argument. Wrappers around it (DistributedDataParallel, torch.compile, PEFT) are looked
            through, compiled and checkpointed parts run plainly while it is explained.
        tokenizer: Names the special tokens and the `mask` and `unk` baselines; optional.
        max_tokens: Rows times tokens of one internal pass: the memory budget. Does not change results.

    Raises:
        UnsupportedModelError: The blocks cannot be found, or an adapter adds positions to the input.
    """

    def __init__(self, model: nn.Module, *, tokenizer: Any = None, max_tokens: int = 8192) -> None:
        refuse_prompt_tuning(model)
        self.module = unwrap(model)
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.structure: Structure = find_structure(self.module)
        self._depth: int | None = None
        self._returns_tuple = False
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
        self._warn_of_precision()
        with self.evaluation(), torch.inference_mode(False), torch.enable_grad():
            yield self

    def _warn_of_precision(self) -> None:
        coarse = {p.dtype for p in self.module.parameters() if p.is_floating_point() and p.element_size() < 4}
        if coarse and not self._warned_of_precision:
            self._warned_of_precision = True
            warnings.warn(
                f"the model's parameters are {', '.join(map(str, coarse))}: completeness gaps and error bounds are "
                "rounding noise at this precision, and steps='auto' will not converge. Explain model.float().",
                stacklevel=3,
            )

    def with_tokenizer(self, tokenizer: Any) -> ExplainableModel:
        """The same live model with another tokenizer."""
        return ExplainableModel(self.module, tokenizer=tokenizer, max_tokens=self.max_tokens)

    # ------------------------------------------------------------------------------------------------ inputs

    def prepare(self, batch: Mapping[str, Any], special_tokens_mask: Tensor | None = None) -> Inputs:
        """Clone a batch for the engine and find its real and special positions.

        Args:
            batch: What the model's forward takes; keys it does not take are left out. `labels` are left out too.
            special_tokens_mask: (B, T) 1 on special tokens; else the tokenizer's, else the model config's ids decide.

        Raises:
            InputError: No `input_ids`, or a mask of another shape.
        """
        kept = {
            key: value.detach().clone().to(self.device) if isinstance(value, Tensor) else value
            for key, value in forward_inputs(self.module, batch).items()
        }
        ids = kept.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise InputError(f"the batch needs `input_ids` of shape (B, T); it has {sorted(batch)}.")
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
        if special_tokens_mask is None:
            special_tokens_mask = batch.get("special_tokens_mask")
        if special_tokens_mask is None:
            known = [*self._special_ids(), *([pad] if isinstance(pad, int) else [])]
            special = torch.isin(ids, torch.tensor(known, device=ids.device, dtype=ids.dtype))
        else:
            special = special_tokens_mask.detach().clone().to(ids.device).bool()
            if special.shape != ids.shape:
                raise InputError(f"special_tokens_mask has shape {tuple(special.shape)}, input_ids {tuple(ids.shape)}.")
        return Inputs(kept, mask, special & mask)

    @property
    def names_special_tokens(self) -> bool:
        """Whether the tokenizer or the model's config names any special token."""
        return bool(self._special_ids())

    def _special_ids(self) -> list[int]:
        if self.tokenizer is not None:
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
                "maps; methods that need one map per block cannot work on it."
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
                    if call == start - 1:
                        trace.states.append(state)
                        return self._like_block(state)
                    return self._like_block(args[0] if args else kwargs["hidden_states"])
                if call == 0:
                    entry = state if state is not None else self._entry(args, kwargs).detach().requires_grad_()
                    trace.states.append(entry)
                    args, kwargs = self._with_entry(entry, args, kwargs)
                result = original(*args, **kwargs)
                self._returns_tuple = isinstance(result, tuple)
                trace.states.append(result[0] if isinstance(result, tuple) else result)
                return result

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

    def _like_block(self, state: Any) -> Any:
        return (state,) if self._returns_tuple else state

    def _entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        entry = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(entry, Tensor) or entry.ndim != 3:
            raise UnsupportedModelError(
                f"the blocks of '{self.structure.family}' do not take a (batch, tokens, width) tensor as their first "
                "argument; looked at the nn.ModuleList with most parameters."
            )
        return entry

    @staticmethod
    def _with_entry(
        entry: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((entry, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entry})

    def require_interface(self) -> Any:
        """The Hugging Face model whose attention can be recorded, or UnsupportedModelError."""
        if self._has_interface is None:
            self._has_interface = uses_attention_interface(self.structure.host)
        if not self._has_interface:
            from calig.pipeline.attribution.methods import available_methods, method_class

            names = [name for name in available_methods() if not method_class(name).needs_attention]
            raise UnsupportedModelError(
                f"'{self.structure.family}' does not use the attention interface of transformers, so its attention "
                f"maps cannot be recorded. Methods that work on it: {', '.join(names)}."
            )
        return self.structure.host

    def chunks(self, rows: Tensor, tokens: int) -> Iterator[Tensor]:
        """Cut (N,) row indices into pieces that fit the token budget."""
        yield from rows.split(max(1, self.max_tokens // max(1, tokens)))

    @torch.no_grad()
    def logits(self, inputs: Inputs) -> Tensor:
        """(B, C) logits at the input, in an open session."""
        from calig.pipeline.attribution.objective import logits_of

        rows = torch.arange(len(inputs), device=self.device)
        parts = [logits_of(self.module(**inputs.select(part))) for part in self.chunks(rows, inputs.mask.shape[1])]
        return torch.cat(parts)
