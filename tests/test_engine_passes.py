"""What the engine runs and keeps: shared passes, the token budget, slices by length, memory, precision, clean-up."""

import copy

import pytest
import torch
from conftest import make_batch, make_bert
from torch.utils._python_dispatch import TorchDispatchMode

from calig.pipeline.attribution import ExplainableModel, attribute
from calig.pipeline.errors import InputError

LENGTHS = (9, 4, 8, 3, 5, 17, 6)


class Rows:
    """Counts rows that run through the first and the last block, and the passes with them."""

    def __init__(self, model):
        self.rows = self.passes = self.tokens = 0
        model.bert.encoder.layer[-1].register_forward_pre_hook(self)

    def __call__(self, _module, args):
        self.passes += 1
        self.rows += len(args[0])
        self.tokens += args[0].shape[0] * args[0].shape[1]


def same(one, other, tolerance=1e-6):
    assert torch.equal(one.target, other.target) and torch.equal(one.mask, other.mask)
    for name in ("scores", "layer_scores", "completeness_gap", "error_bound", "output_change"):
        mine, yours = getattr(one, name), getattr(other, name)
        assert (mine is None) == (yours is None)
        if mine is not None:
            # Gaps and bounds are what is left after cancellation, divided by a change that may be small.
            relative = name in ("completeness_gap", "error_bound")
            assert torch.allclose(mine, yours, atol=10 * tolerance if relative else tolerance), name


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ca_lig", "steps": 6},
        {"method": "ca_lig", "steps": 5, "path": "straight"},
        {"method": "ca_lig", "steps": 5, "attention_gradient_at": "path"},
        {"method": "integrated_gradients", "steps": 6},
        {"method": "generic_attention"},
        {"method": "input_x_gradient"},
    ],
)
def test_several_targets_cost_the_forward_passes_of_one(bert, batch, options):
    targets = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0]])
    counter = Rows(bert)
    alone = [attribute(bert, batch, target=column, **options) for column in targets.T]
    one, counter.rows = counter.rows // 3, 0
    together = attribute(bert, batch, target=targets, **options)
    assert counter.rows == one
    for mine, yours in zip(together, alone, strict=True):
        same(mine, yours)


def test_several_targets_refine_together_until_each_is_good_enough():
    model, batch = make_bert(spread=0.5, layers=4), make_batch((9, 6, 8))
    targets = torch.tensor([[0, 1], [2, 0], [1, 2]])
    alone = [attribute(model, batch, target=column, steps="auto", max_steps=2000) for column in targets.T]
    together = attribute(model, batch, target=targets, steps="auto", max_steps=2000)
    assert torch.equal(together[0].steps_used, together[1].steps_used)
    for mine, yours in zip(together, alone, strict=True):
        assert mine.converged.all() and (mine.error_bound.amax(1) <= 0.02).all()
        assert (mine.steps_used >= yours.steps_used * 0.7).all()
    # Nodes of all targets are one set: fewer than running each alone.
    assert together[0].steps_used.sum() < sum(result.steps_used.sum() for result in alone)


def test_the_shared_path_runs_no_node_twice(bert, batch):
    counter = Rows(bert)
    attribute(bert, batch, "ca_lig", target=[0, 1, 2], steps=7)
    # One row more tells the number of classes, one what enters the blocks, and one, once, that nothing passes by them.
    assert counter.rows <= 3 * 7 + 3


# ------------------------------------------------------------------------------------------------ token budget


class Memory:
    """Fails like an allocator when a pass of the model holds more than so many tokens."""

    def __init__(self, model, tokens, error):
        self.tokens, self.error, self.failures = tokens, error, 0
        self.handle = model.bert.encoder.layer[0].register_forward_pre_hook(self)

    def __call__(self, _module, args):
        if args[0].shape[0] * args[0].shape[1] > self.tokens:
            self.failures += 1
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried ..."),
    ],
)
@pytest.mark.parametrize("options", [{"steps": 9}, {"steps": "auto"}, {"path": "straight", "steps": 4}])
def test_auto_budget_halves_and_remembers(bert, batch, options, error):
    reference = attribute(bert, batch, target=0, **options)
    memory = Memory(bert, 20, error)
    wrapped = ExplainableModel(bert)
    same(attribute(wrapped, batch, target=0, **options), reference, 1e-5)
    assert memory.failures > 0 and wrapped.max_tokens <= 20
    failures = memory.failures
    attribute(wrapped, batch, target=0, **options)
    attribute(wrapped.with_tokenizer(None), batch, target=0, **options)
    assert memory.failures == failures


def test_what_does_not_fit_is_said(bert, batch):
    memory = Memory(bert, 5, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError, match=r"one row of 9 tokens does not fit.*shorten"):
        attribute(bert, batch, target=0)
    memory.tokens = 20
    with pytest.raises(torch.OutOfMemoryError, match=r"max_tokens_per_pass below 100, or to 'auto'"):
        attribute(ExplainableModel(bert, max_tokens_per_pass=100), batch, target=0)
    for bad in (0, -1, "all", 1.5, True):
        with pytest.raises(InputError, match="max_tokens_per_pass"):
            ExplainableModel(bert, max_tokens_per_pass=bad)
    memory.error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        attribute(bert, batch, target=0)


# ------------------------------------------------------------------------------------------------ slices by length


@pytest.mark.parametrize("method", ["ca_lig", "integrated_gradients", "attention_rollout", "random"])
def test_a_ragged_batch_is_cut_to_length_and_comes_back_in_order(bert, method, monkeypatch):
    batch = make_batch(LENGTHS, width=20)
    counter = Rows(bert)
    cut = attribute(bert, batch, method, target=1)
    spent, counter.tokens = counter.tokens, 0
    from calig.pipeline.attribution import slicing

    monkeypatch.setattr(slicing, "_can_trim", lambda _inputs: False)
    whole = attribute(bert, batch, method, target=1)
    same(cut, whole, 1e-5)
    assert cut.scores.shape == (7, 20) and cut.mask.sum(1).tolist() == list(LENGTHS)
    assert spent < 0.6 * counter.tokens  # 52 real tokens of 140
    if method == "ca_lig":
        assert torch.allclose(cut.parts["evidence"], whole.parts["evidence"], atol=1e-5)


def test_flow_and_budget_of_a_ragged_batch(bert):
    batch = make_batch(LENGTHS)
    cut = attribute(ExplainableModel(bert, max_tokens_per_pass=20), batch, target=1, return_flow=True)
    for row, length in enumerate(LENGTHS):
        one = {key: value[row : row + 1, :length] for key, value in batch.items()}
        alone = attribute(bert, one, target=1, return_flow=True)
        assert torch.allclose(cut.flow[row, :, :length, :length], alone.flow[0], atol=1e-5)
        assert (cut.flow[row, :, length:] == 0).all() and (cut.flow[row, :, :, length:] == 0).all()


def test_left_padding_and_callables_keep_their_width(bert):
    batch = make_batch(LENGTHS)
    counter = Rows(bert)
    left = {key: value.flip(1) for key, value in batch.items()}
    with pytest.warns(UserWarning, match="padded on the left"):
        attribute(bert, left, "input_x_gradient", target=1)
    assert counter.tokens == counter.rows * 17
    counter.rows = counter.tokens = 0
    attribute(bert, batch, "input_x_gradient", objective=lambda output: output.logits[:, 0])
    assert counter.tokens == counter.rows * 17


# ------------------------------------------------------------------------------------------------ memory


class PeakBytes(TorchDispatchMode):
    """The most bytes that storages made within the context held at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor) and (storage := item.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("path", ["shared", "straight"])
def test_memory_does_not_grow_with_the_steps(bert, path):
    peaks = []
    for steps in (8, 64):
        with PeakBytes() as counter:
            attribute(ExplainableModel(bert, max_tokens_per_pass=60), make_batch(), target=0, path=path, steps=steps)
        peaks.append(counter.peak)
    assert peaks[1] <= 1.1 * peaks[0]


def test_nodes_that_are_not_kept_are_run_again_with_the_same_result(monkeypatch):
    from calig.pipeline.attribution import refinement

    model, batch = make_bert(spread=0.5, layers=4), make_batch((9, 6, 8))
    counter = Rows(model)
    reference = attribute(model, batch, target=0, steps="auto", max_steps=600)
    kept, counter.rows = counter.rows, 0
    monkeypatch.setattr(refinement, "_KEPT_FLOATS", 20 * 2 * 5 * 9 * 24)  # 20 nodes
    few = attribute(model, batch, target=0, steps="auto", max_steps=600)
    assert counter.rows > kept
    assert torch.equal(few.steps_used, reference.steps_used)
    same(few, reference, 1e-5)


# ------------------------------------------------------------------------------------------------ precision


def spearman(one, other):
    ranks = [values.argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def identity(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    facts = [(name, id(value), value.dtype, value.data_ptr(), value.requires_grad) for name, value in tensors]
    return facts, {name: value.clone() for name, value in tensors}


def assert_identical(before, model):
    facts, values = identity(model)
    assert facts == before[0]
    assert all(torch.equal(values[name], before[1][name]) for name in values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_explained_in_float32_and_left_as_they_are(dtype):
    model, batch = make_bert(spread=0.2), make_batch((12, 10, 11))
    model.to(dtype)
    model.bert.encoder.layer[1].requires_grad_(False)
    model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = identity(model)
    result = attribute(model, batch, target=1, steps=64)
    assert_identical(before, model)
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    reference = attribute(copy.deepcopy(model).float(), batch, target=1, steps=64)
    same(result, reference)
    assert (result.completeness_gap < 0.05).all()
    with pytest.raises(InputError, match="target"):
        attribute(model, batch, target=99)
    assert_identical(before, model)


def test_float32_and_bfloat16_agree():
    model, batch = make_bert(spread=0.2), make_batch((20, 18, 19))
    exact = attribute(model, batch, target=1, steps=32)
    upcast = attribute(copy.deepcopy(model).bfloat16(), batch, target=1, steps=32)
    with pytest.warns(UserWarning, match="bfloat16"):
        coarse = attribute(
            ExplainableModel(copy.deepcopy(model).bfloat16(), precision="model"), batch, target=1, steps=32
        )
    for found in (upcast, coarse):
        for row in range(3):
            content = exact.mask[row] & ~exact.special[row]
            assert spearman(exact.scores[row, content], found.scores[row, content]) >= 0.99


def test_tied_parameters_stay_tied_in_float32():
    from calig.pipeline.attribution.precision import float32_copies

    first, second = torch.nn.Linear(2, 2).bfloat16(), torch.nn.Linear(2, 2).bfloat16()
    second.weight = first.weight
    own = first.weight
    with float32_copies(torch.nn.Sequential(first, second)):
        assert first.weight is second.weight and first.weight.dtype == torch.float32
    assert first.weight is second.weight is own


def test_an_unknown_precision_is_an_error(bert):
    with pytest.raises(InputError, match="precision takes 'float32' or 'model', got 'half'"):
        ExplainableModel(bert, precision="half")


# ------------------------------------------------------------------------------------------------ clean-up


def footprint(model):
    return (
        [
            (name, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks), part.training)
            for name, part in model.named_modules()
        ],
        [name for name, part in model.named_modules() if "forward" in vars(part)],
        model.config._attn_implementation,
        torch.get_rng_state().tolist(),
        [id(parameter.grad) for parameter in model.parameters()],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("attention_gradient_at", ["point", "path"])
def test_no_hook_survives_at_any_stage(dtype, stop, attention_gradient_at):
    """Stop in every pass of an explanation in turn, from inside a block."""
    model, batch = make_bert(layers=2, dtype=dtype), make_batch((6, 6, 6))
    model.train()
    model.bert.encoder.layer[0].eval()
    options = {"target": [0, 1, 2], "steps": 3, "attention_gradient_at": attention_gradient_at}
    wrapped = ExplainableModel(model, max_tokens_per_pass=60)
    calls, last = 0, None

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == last:
            raise stop

    model.bert.encoder.layer[1].attention.register_forward_hook(interrupt)
    attribute(wrapped, batch, **options)  # the first call also looks at the model once
    calls = 0
    attribute(wrapped, batch, **options)
    before, weights = footprint(model), identity(model)
    for stage in range(1, calls + 1):
        calls, last = 0, stage
        with pytest.raises(type(stop)):
            attribute(wrapped, batch, **options)
        assert footprint(model) == before
        assert_identical(weights, model)
    last = None
    assert attribute(wrapped, batch, **options).scores.isfinite().all()


# ------------------------------------------------------------------------------------------------ along the path


def test_attention_gradient_along_the_path_equals_a_loop():
    model, batch = make_bert(layers=2, attention="eager"), make_batch((6,))
    ids, special = batch["input_ids"], batch["special_tokens_mask"].bool()
    bert = model.bert
    here, there = bert.embeddings(ids).detach(), bert.embeddings(torch.where(special, ids, 0)).detach()
    total = [torch.zeros(6, 6) for _ in range(2)]
    for k in range(5):
        state = (there + k / 4 * (here - there)).requires_grad_()
        maps = []
        for block in bert.encoder.layer:
            attention = block.attention.self
            q, key, v = (
                f(state).view(1, 6, 3, 8).transpose(1, 2) for f in (attention.query, attention.key, attention.value)
            )
            maps.append((q @ key.transpose(2, 3) / 8**0.5).softmax(-1))
            mixed = block.attention.output((maps[-1] @ v).transpose(1, 2).reshape(1, 6, 24), state)
            state = block.output(block.intermediate(mixed), mixed)
        gradients = torch.autograd.grad(model.classifier(bert.pooler(state))[0, 1], maps)
        weight = 1 / 8 if k in (0, 4) else 1 / 4
        for sums, attention, gradient in zip(total, maps, gradients, strict=True):
            sums += weight * (attention * gradient)[0].detach().clamp_min(0).mean(0)
    result = attribute(
        model, batch, target=1, steps=5, attention_gradient_at="path", fusion="diagonal", lam=0.0, return_flow=True
    )
    for layer in range(2):
        expected = total[layer] / total[layer].abs().max()
        assert torch.allclose(result.flow[0, layer].T, expected, atol=1e-5)


def test_attention_gradient_along_an_adaptive_path_uses_the_examples_own_nodes():
    model, batch = make_bert(spread=0.5, layers=3), make_batch((9, 6, 8))
    options = {"target": 0, "steps": "auto", "attention_gradient_at": "path"}
    together = attribute(model, batch, **options)
    for row, length in enumerate((9, 6, 8)):
        one = {key: value[row : row + 1, :length] for key, value in batch.items()}
        alone = attribute(model, one, **options)
        assert torch.allclose(alone.scores[0], together.scores[row, :length], atol=1e-4)
    with pytest.raises(InputError, match="attention_gradient_at='path'"):
        attribute(model, batch, path="straight", attention_gradient_at="path")


def test_trapezoid_weights_of_scattered_nodes():
    from calig.pipeline.attribution.inside import trapezoid_weights

    rows, positions = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([0.0, 1.0, 1.0, 0.25, 0.0]).double()
    assert trapezoid_weights(rows, positions).tolist() == [0.125, 0.375, 0.5, 0.5, 0.5]
