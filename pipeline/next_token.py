"""`explain_next_token`: which tokens of a prompt raise or lower what a causal language model would write next.

Shapes: B prompts, T tokens, V vocabulary, K next tokens that are explained together.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calig.pipeline.attribution.methods import create_method
from calig.pipeline.errors import InputError
from calig.pipeline.explaining import check_texts, curve_operator
from calig.pipeline.explanation import Explanation
from calig.pipeline.opening import Opened, open_language_model
from calig.pipeline.perturbation import CURVE_METRICS, Curves, perturbation_curves
from calig.pipeline.vocabulary import quoted, spelled_tokens

if TYPE_CHECKING:
    from torch import Tensor, nn

    from calig.pipeline.attribution import Attribution, ExplainableModel
    from calig.pipeline.explainer import Explained


@dataclass(frozen=True)
class NextTokenQuestion:
    """What is asked of every prompt.

    Attributes:
        target: The next token to explain: its text, `id:N` or an id; None: the most likely one.
        versus: The token that it is set against, likewise; None explains the target alone.
        top: Explain the so many most likely tokens instead, each by itself.
        position: The token that the model predicts from; what stands behind it is cut off. Counted over the tokens of
            each prompt from 0, from the end if negative.
        log_prob: Explain the log-probability instead of the logit.
    """

    target: str | int | None = None
    versus: str | int | None = None
    top: int = 1
    position: int = -1
    log_prob: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise InputError(f"top takes 1 or more, got {self.top}.")
        if self.top > 1 and not (self.target is None and self.versus is None):
            raise InputError(f"top={self.top} explains the most likely tokens; give either it, or target and versus.")


@dataclass(frozen=True, repr=False)
class NextTokenExplanation(Explanation):
    """How much each token of a prompt raises or lowers a next token; `target` and `prediction` are token ids.

    Attributes:
        versus: Id of the token that the target is set against.
        versus_probability: The model's probability of it.
        token_names: Token id -> its text in quotes.
    """

    versus: int | None = None
    versus_probability: float | None = None
    token_names: Mapping[int, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: the next token, what it is set against, the method, and how far to trust it."""
        parts = [f"next {self.target_name} {_share(self.probability)}"]
        if self.versus is not None and self.versus_probability is not None:
            parts.append(f"rather than {self._name(self.versus)} {_share(self.versus_probability)}")
        if self.target != self.prediction:
            parts.append(f"most likely {self.prediction_name}")
        return " · ".join([*parts, *self._trust()])

    def _name(self, index: int) -> str:
        return self.token_names.get(index, f"token {index}")


def _share(probability: float | None) -> str:
    assert probability is not None  # a next token always has one
    # Of fifty thousand tokens most have next to nothing.
    return f"{probability:.3f}" if probability >= 0.0005 else f"{probability:.0e}"


def explain_next_token(
    source: str | Path | nn.Module,
    texts: Sequence[str],
    *,
    target: str | int | None = None,
    versus: str | int | None = None,
    top: int = 1,
    position: int = -1,
    log_prob: bool = False,
    method: str = "ca_lig",
    batch_size: int = 16,
    tokenizer: Any = None,
    curves: bool = False,
    **options: Any,
) -> list[NextTokenExplanation]:
    """Explain what a causal language model would write next.

    Args:
        source: A Hugging Face folder of a causal language model, or a live one.
        texts: The prompts.
        target: The next token to explain: its text, `id:N` or an id; by default the most likely one.
        versus: The token that it is set against: why the target rather than this one.
        top: Explain the so many most likely tokens, which share their forward passes.
        position: The token of the prompt that the model predicts from; by default the last one.
        log_prob: Explain the log-probability, which every other token has a part in, instead of the logit.
        method: One of `available_methods()`.
        batch_size: Prompts at a time; changes the speed only.
        tokenizer: Needed with a live model.
        curves: Measure the target's probability as tokens of the prompt are removed, or kept alone, with controls, for
            `Explanation.plot_curves`. Tokens are masked where there is a token for it, else hidden from attention.
        **options: Options of the method. By default `steps="auto"`, and `fusion="carried"` with `lam=0.5` for `ca_lig`.

    Returns:
        One explanation per prompt in their order; with `top` that many of each, the likeliest first.

    Raises:
        InputError: No or an empty text, a text longer than the model takes, a target that is not one token of the
            vocabulary, a source that is no causal language model.
        SampleFailure: A prompt could not be explained; the message names it.

    Example::

        explain_next_token("path/to/gpt2", ["The capital of France is"], target=" Paris", versus=" London")
    """
    check_texts(texts, None)
    create_method(method, options)  # before anything slow
    question = NextTokenQuestion(target, versus, top, position, log_prob)
    if batch_size < 1:
        raise InputError(f"batch_size takes 1 or more, got {batch_size}.")
    opened = open_language_model(source, tokenizer)
    rows: list[dict[str, Any]] = []
    for explained in next_token_batches(opened, texts, question, method, options, batch_size, curves=curves):
        if explained.failures:
            from calig.pipeline.explained import SampleFailure

            first = explained.failures[0]
            raise SampleFailure(f"text {first['sample_id']} was not explained by '{method}': {first['reason']}")
        rows += explained.explanations
    rows.sort(key=lambda row: row["sample_id"])  # stable: those of one prompt stay in order
    return [next_token_explanation(row, opened.tokenizer) for row in rows]


def causal_defaults(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a method does by default in a causal model: CA-LIG carries evidence back to where it was gathered from."""
    given = {"fusion", "attention_gradient", "attention_gradient_at"} & set(options)
    return {"fusion": "carried", "lam": 0.5} if method == "ca_lig" and not given else {}


def next_token_explanation(row: Mapping[str, Any], tokenizer: Any) -> NextTokenExplanation:
    """From a row of `next_token_batches`."""
    versus = row.get("versus")
    known = {row["target"], row["prediction"]} | (set() if versus is None else {versus})
    found = NextTokenExplanation.from_row(row)
    assert isinstance(found, NextTokenExplanation)
    return dataclasses.replace(
        found,
        versus=versus,
        versus_probability=row.get("versus_probability"),
        token_names={token: quoted(tokenizer, token) for token in known},
    )


def next_token_batches(
    opened: Opened,
    texts: Sequence[Any],
    question: NextTokenQuestion,
    method: str,
    options: Mapping[str, Any],
    batch_size: int,
    *,
    curves: bool = False,
) -> Iterator[Explained]:
    """Explain in batches, the longest prompts first; everything is tokenised, and so checked, before the first one.

    Yields:
        The rows of a batch, in the schema of explanations with token ids as `target` and `prediction`, and beside it
        `versus` and `versus_probability`, and `curves` if asked for.

    Raises:
        InputError: See `explain_next_token`.
    """
    from calig.datamodules.collate import TextCollator
    from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError
    from calig.pipeline.explainer import settings_for

    tokenizer = opened.tokenizer
    chosen = settings_for([method], {method: {**causal_defaults(method, options), **options}}, {"steps": "auto"})[
        method
    ]
    prompts = _prompts(opened, texts, question.position)
    asked = _Asked(
        question,
        None if question.target is None else _spelled(tokenizer, question.target, "target"),
        None if question.versus is None else _spelled(tokenizer, question.versus, "versus"),
        curve_operator(opened) if curves else None,
    )
    collate = TextCollator(tokenizer.pad_token_id, "right", ("input_ids", "attention_mask"))
    prompts.sort(key=lambda row: -len(row["input_ids"]))
    try:
        model = ExplainableModel(opened.model, tokenizer=tokenizer)
        for start in range(0, len(prompts), batch_size):
            batch = collate(prompts[start : start + batch_size])
            batch = {key: value.to(model.device) for key, value in batch.items()}
            yield _explain(model, batch, asked, method, chosen)
    except UnsupportedModelError as error:  # here the model is what a user gave
        raise InputError(str(error)) from error


@dataclass(frozen=True)
class _Asked:
    """The question, with the ids that its spellings may mean, and how curves remove tokens where they are wanted."""

    question: NextTokenQuestion
    target: list[int] | None
    versus: list[int] | None
    operator: str | None


def _spelled(tokenizer: Any, spelling: str | int, flag: str) -> list[int]:
    ids = spelled_tokens(tokenizer, spelling, flag)
    if len(ids) > 1:
        ways = " and ".join(quoted(tokenizer, token) for token in ids)
        exact = " or ".join(f"id:{token}" for token in ids)
        warnings.warn(
            f"{flag} {spelling!r} is two tokens of this model, {ways}: the likelier one of each text is taken. "
            f"{exact} names one.",
            stacklevel=5,
        )
    return ids


def _prompts(opened: Opened, texts: Sequence[Any], position: int) -> list[dict[str, Any]]:
    """The texts as they stand in front of a next token: complete, and without what the tokenizer puts at the end."""
    from calig.datamodules.examples import TextExample
    from calig.datamodules.tokenization import encode_all

    examples = [TextExample(i, text, None, None) for i, text in enumerate(texts)]
    prompts = []
    for row in encode_all(examples, opened.tokenizer, opened.max_length):
        number, special = row["sample_id"], row["special_tokens_mask"]
        if row["truncated"]:
            raise InputError(
                f"texts[{number}] is {len(special) + row['tokens_cut']} tokens and the model takes "
                f"{opened.max_length}: cut, it would end somewhere else. Shorten it, at the beginning."
            )
        end = len(special)
        while end and special[end - 1]:
            end -= 1
        place = position + end if position < 0 else position
        if not 0 <= place < end:
            raise InputError(
                f"position {position} does not exist in texts[{number}], which has {end} tokens: they count from 0, or "
                "from the end with -1."
            )
        if all(special[: place + 1]):
            raise InputError(
                f"position {position} of texts[{number}] is a special token, and nothing of the text stands in front "
                "of what is written there; take a later one."
            )
        prompts.append({key: value[: place + 1] if isinstance(value, list) else value for key, value in row.items()})
    return prompts


def _next_logits(model: ExplainableModel, batch: Mapping[str, Tensor]) -> Tensor:
    """(n, V) logits of what follows the last real token of each row, float32, in one pass."""
    import torch

    from calig.pipeline.attribution.model import forward_inputs
    from calig.pipeline.attribution.objective import raw_logits

    logits = raw_logits(model.module(**forward_inputs(model.module, batch)))
    if logits.ndim != 3:
        raise InputError(
            f"the model's logits have shape {tuple(logits.shape)}; a causal language model returns (batch, tokens, "
            "vocabulary). Explain a classifier by explain(...)."
        )
    places = torch.arange(logits.shape[1], device=logits.device)
    last = (batch["attention_mask"] * places).argmax(dim=1)
    return logits[torch.arange(len(logits), device=logits.device), last].float()


def _explain(
    model: ExplainableModel, batch: Mapping[str, Tensor], asked: _Asked, method: str, options: Mapping[str, Any]
) -> Explained:
    import torch

    from calig.pipeline.attribution import NextToken, attribute
    from calig.pipeline.explained import NON_FINITE_OUTPUT, Explained

    ids, question = batch["sample_id"].tolist(), asked.question
    rows = torch.arange(len(ids), device=model.device)
    with model.session(), torch.no_grad():
        parts = model.budget.run(
            rows,
            batch["input_ids"].shape[1],
            lambda some: _next_logits(model, {key: value[some] for key, value in batch.items()}),
        )
    logits = torch.cat(parts).cpu()
    result = Explained()

    def fail(flags: Tensor, reason: str) -> None:
        new = {ids[i] for i in flags.nonzero().flatten().tolist()} - {row["sample_id"] for row in result.failures}
        result.fail(sorted(new), method, reason)

    finite = logits.isfinite().all(dim=1)
    fail(~finite, NON_FINITE_OUTPUT)
    if not finite.all():
        good = finite.nonzero().flatten()
        if len(good):
            rest = {key: value[good.to(value.device)] for key, value in batch.items()}
            result.extend(_explain(model, rest, asked, method, options))
        return result
    targets = _likelier(logits, asked.target)[None] if asked.target else logits.topk(question.top).indices.T
    versus = _likelier(logits, asked.versus) if asked.versus else None
    if versus is not None:
        for i in (targets[0] == versus).nonzero().flatten().tolist():
            name = quoted(model.tokenizer, int(versus[i]))
            default = "" if asked.target else ", the most likely one"
            raise InputError(f"texts[{ids[i]}]: target and versus are both {name}{default}; name two different tokens.")
    goals = [NextToken(target, log_prob=question.log_prob, against=versus) for target in targets]
    found = attribute(
        model,
        dict(batch),
        method,
        objective=goals,
        special_tokens_mask=batch["special_tokens_mask"],
        **options,
    )
    assert isinstance(found, list)  # of several objectives
    probabilities = logits.double().softmax(dim=1)
    for attribution in found:
        bad = attribution.non_finite()
        fail(bad, "a score is not finite")
        for i in (~bad).nonzero().flatten().tolist():
            row = _row(model.tokenizer, batch, attribution, i, probabilities[i])
            if versus is not None:
                row |= {"versus": int(versus[i]), "versus_probability": float(probabilities[i, versus[i]])}
            if asked.operator is not None:
                row["curves"] = _curves(model, batch, attribution, i, asked.operator, row["probability"])
            result.explanations.append(row)
    return result


def _curves(
    model: ExplainableModel,
    batch: Mapping[str, Tensor],
    result: Attribution,
    i: int,
    operator: str,
    probability: float,
) -> dict[str, Curves]:
    """Control -> what is left of a next token's probability as tokens of its prompt go, or stay alone."""
    from calig.pipeline.metrics import faithfulness_rows
    from calig.pipeline.perturbers import perturbation_tokens

    one = slice(i, i + 1)
    with model.session():
        rows = faithfulness_rows(
            lambda inputs: _next_logits(model, inputs),
            {key: batch[key][one] for key in ("input_ids", "attention_mask")},
            {result.method: result.scores[one]},
            target=result.target[one],
            special=result.special[one],
            mask=result.mask[one],
            sample_ids=[0],
            tokens=perturbation_tokens(model.module, model.tokenizer),
            metrics=tuple(CURVE_METRICS),
            operators=(operator,),
            spaces=("probability",),
        )
    found = perturbation_curves(rows, {0: probability})
    return {control: curves for (_, control), curves in found.items()}


def _likelier(logits: Tensor, ids: Sequence[int]) -> Tensor:
    """(B,) of the ids that a spelling may mean, the likelier one."""
    import torch

    return torch.tensor(ids)[logits[:, list(ids)].argmax(dim=1)]


def _row(
    tokenizer: Any, batch: Mapping[str, Tensor], result: Attribution, i: int, probability: Tensor
) -> dict[str, Any]:
    real = result.mask[i]
    gap, bound, layers = result.completeness_gap, result.error_bound, result.layer_scores
    words = batch["word_ids"][i].cpu()[real].tolist()
    target = int(result.target[i])
    return {
        "sample_id": int(batch["sample_id"][i]),
        "tokens": list(tokenizer.convert_ids_to_tokens(batch["input_ids"][i].cpu()[real].tolist())),
        "word_ids": [None if word < 0 else int(word) for word in words],
        "scores": result.scores[i, real].tolist(),
        "layer_scores": None if layers is None else layers[i][:, real].tolist(),
        "prediction": int(probability.argmax()),
        "target": target,
        "probability": float(probability[target]),
        "method": result.method,
        "completeness_gap": None if gap is None else float(gap[i].max()),
        "steps_used": int(result.steps_used[i]),
        "error_bound": None if bound is None else float(bound[i].max()),
        "converged": bool(result.converged[i]),
    }
