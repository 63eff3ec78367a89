"""What the inputs of a model are perturbed with, and the inputs that perturbations are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calig.pipeline.attribution import ExplainableModel
from calig.pipeline.attribution.model import forward_inputs
from calig.pipeline.batch_facts import BatchFacts
from calig.pipeline.image_rows import takes_images
from calig.pipeline.metrics import PerturbationTokens
from calig.pipeline.metrics.patches import PatchPerturbation
from calig.pipeline.metrics.sensitivity import take_rows

if TYPE_CHECKING:
    from calig.pipeline.metrics.patches import Perturber


def perturber(model: ExplainableModel, tokenizer: Any) -> Perturber:
    """What the inputs of a model are perturbed with: tokens of texts, patches of images."""
    if takes_images(model):
        return PatchPerturbation(model, tokenizer)
    return perturbation_tokens(model.module, tokenizer)


def perturbation_tokens(model: nn.Module, tokenizer: Any) -> PerturbationTokens:
    """The ids that perturbed inputs are built with: the tokenizer's, else what the model's config names."""
    if tokenizer is not None:
        return PerturbationTokens.from_tokenizer(tokenizer)
    config = getattr(model, "config", None)
    first = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos")]
    pad = getattr(config, "pad_token_id", None)
    empty = next((token for token in first if token is not None), None)
    return PerturbationTokens(pad_id=0 if pad is None else pad, empty_id=empty)


def default_operator(model: nn.Module, tokenizer: Any) -> str:
    """`mask` where the model has something to put in the place of a token or patch, else `attention`."""
    tokens = perturber(ExplainableModel(model, tokenizer=tokenizer), tokenizer)
    return "attention" if isinstance(tokens, PerturbationTokens) and tokens.mask_id is None else "mask"


def perturbable(model: ExplainableModel, facts: BatchFacts, group: Sequence[int]) -> dict[str, Any]:
    """The inputs of some examples of a batch, as the planner takes them."""
    if facts.image is not None:
        return take_rows(forward_inputs(model.module, facts.batch), torch.tensor(group), len(facts.ids))
    index = torch.tensor(group, device=facts.batch["input_ids"].device)
    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in facts.batch]
    batch = {key: facts.batch[key][index] for key in keys}
    batch.setdefault("attention_mask", facts.mask[group].to(batch["input_ids"]))
    return batch
