"""Every metric class: batched equals single, repeated samples count once, one process equals two, NaN is an error."""

import math
import time

import pytest
import torch
from torchmetrics import MetricCollection

from calig.pipeline import metrics
from calig.pipeline.errors import InputError
from calig.pipeline.metrics import MetricError, f1_of_means, token_f1

B, T, V, L = 9, 7, 6, 3
IDS = [2**24 + 3 * i for i in range(B)]


def inputs():
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(B, *shape, generator=generator)

    mask = torch.ones(B, T).bool()
    mask[::2, 5:] = False
    special = torch.zeros(B, T).bool()
    special[:, 0] = True
    gold = (rand(V) > 0.3).long()
    gold[:, 2] = 1
    gold[4] = 0  # an empty rationale
    gold[5] = 1  # all words
    words, heat, outline = list(rand(V)), list(rand(3, 4)), list((rand(3, 4) > 0.5).long())
    outline[2] = torch.zeros(3, 4)
    plausibility, images = (words, list(gold)), (heat, outline)
    correct = (rand(10) > 0).long()
    layers = rand(L, T)
    correlated = (rand(T), rand(T), mask & ~special)
    return {
        "Comprehensiveness": (rand(), rand(5)),
        "Sufficiency": (rand(), rand(5)),
        "LogOdds": (rand(), rand(5)),
        "DeletionAUC": (rand(11),),
        "InsertionAUC": (rand(11),),
        "PositiveAUC": (correct,),
        "NegativeAUC": (correct,),
        "Infidelity": (list(rand(64, V) > 0), list(rand(V)), list(rand(64))),
        "SensitivityMax": (rand(T), rand(10, T), mask),
        "CompletenessGap": (rand(4).abs(),),
        "CompletenessGapMax": (rand(4).abs(),),
        "Randomisation": correlated,
        "Drift": correlated,
        "SpecialShare": (rand(T), special, mask),
        "LayerProfile": (layers, mask),
        "TokenF1": plausibility,
        "TokenIoU": plausibility,
        "IoUF1": plausibility,
        "AUPRC": plausibility,
        "PointingGame": images,
        "MaskAUPRC": images,
        "MaskIoU": images,
    }


NAMES = list(inputs())
NO_DIRECTION = {"Drift", "Randomisation", "SpecialShare", "LayerProfile"}


def make(name):
    return metrics.LayerProfile(num_layers=L) if name == "LayerProfile" else getattr(metrics, name)()


def add(metric, given, chosen):
    metric.update(
        *([one[i] for i in chosen] if isinstance(one, list) else one[chosen] for one in given),
        sample_id=[IDS[i] for i in chosen],
    )


def results(metric):
    intervals = getattr(metric, "compute_interval", list)()
    intervals = intervals if isinstance(intervals, list) else [intervals]
    return [*metric.compute().reshape(-1).tolist(), *(number for one in intervals for number in one)]


def whole(name):
    metric = make(name)
    add(metric, inputs()[name], list(range(B)))
    return metric


def test_every_class_is_here():
    from torchmetrics import Metric

    public = {name for name in metrics._HOME if isinstance(getattr(metrics, name), type)}
    classes = {name for name in public if issubclass(getattr(metrics, name), Metric)}
    assert classes - {"SampleMetric", "SampleStates"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_batched_equals_single_and_repeated_samples_count_once(name):
    metric, given = make(name), inputs()[name]
    for i in [3, 0, 7, 1, 8, 2, 3, 4, 5, 6, 0]:
        add(metric, given, [i])
    expected = results(whole(name))
    assert results(metric) == pytest.approx(expected, abs=1e-6)
    assert all(math.isfinite(number) for number in expected)
    states = [*metric.values, *metric.id_high, *metric.id_low]
    assert all(state.dim() == 1 and state.dtype == torch.float32 for state in states)
    assert (metric.higher_is_better is None) == (name in NO_DIRECTION)
    metric.reset()
    add(metric, given, [5, 6])
    again = make(name)
    add(again, given, [6, 5])
    assert results(metric) == pytest.approx(results(again), abs=1e-6)


def test_values_by_hand():
    given = inputs()
    value = {name: whole(name).compute() for name in NAMES}
    for name in ("DeletionAUC", "InsertionAUC"):
        assert value[name].item() == pytest.approx(torch.trapezoid(given[name][0], dx=0.1).mean().item(), abs=1e-6)
    accuracy = given["PositiveAUC"][0].double().mean(0)  # the area under the mean is the mean of the areas
    assert value["PositiveAUC"].item() == pytest.approx(100 * torch.trapezoid(accuracy, dx=0.1).item(), abs=1e-4)
    import numpy as np

    errors = []
    for removed, scores, drops in zip(*given["Infidelity"]):
        attributed = (removed.double() @ scores.double())[:, None].numpy()
        errors.append(np.linalg.lstsq(attributed, drops.double().numpy(), rcond=None)[1][0] / 64)
    assert value["Infidelity"].item() == pytest.approx(np.mean(errors), abs=1e-6)
    gaps = given["CompletenessGap"][0].amax(1)
    assert value["CompletenessGap"].item() == pytest.approx(gaps.mean().item(), abs=1e-6)
    gaps = given["CompletenessGapMax"][0].amax(1)
    assert value["CompletenessGapMax"] == gaps.max()
    assert not hasattr(metrics.CompletenessGapMax, "compute_interval")
    assert value["LayerProfile"].shape == (L,) and value["LayerProfile"].sum().item() == pytest.approx(1.0)
    assert len(whole("LayerProfile").compute_interval()) == L
    assert value["Drift"] == value["Randomisation"]
    scores, gold = given["TokenF1"]
    parts = [metrics.iou_precision_recall(s, g) for s, g in zip(scores, gold) if g.any()]
    assert value["IoUF1"].item() == pytest.approx(f1_of_means(torch.tensor(parts).mean(0)).item(), abs=1e-6)
    for name in ("TokenF1", "TokenIoU", "IoUF1", "PointingGame", "MaskIoU"):
        assert whole(name).compute_interval()[3:] == (B - 1, 1)
    assert whole("AUPRC").compute_interval()[3:] == (B - 2, 2)


def test_token_f1_with_other_lengths():
    scores, gold = inputs()["TokenF1"]
    for metric, k in ((metrics.TokenF1(dataset_length=2.4), 2), (metrics.TokenF1(fraction=0.5), 3)):
        metric.update(scores, gold, IDS)
        values = [token_f1(s, g, k) for s, g in zip(scores, gold) if g.any()]
        assert metric.compute().item() == pytest.approx(sum(values) / len(values), abs=1e-6)
    for options in (
        {"dataset_length": 2.0, "fraction": 0.5},
        {"fraction": 0.0},
        {"fraction": 2.0},
        {"dataset_length": -1},
    ):
        with pytest.raises(InputError):
            metrics.TokenF1(**options)


@pytest.mark.parametrize("name", NAMES)
def test_nan_names_the_sample(name):
    for bad in (float("nan"), float("inf")):
        given = list(inputs()[name])
        of_floats = 1 if name == "Infidelity" else 0  # what its draws remove is a mask
        if isinstance(given[of_floats], list):
            given[of_floats][1] = given[of_floats][1].clone().fill_(bad)
        else:
            given[of_floats] = given[of_floats].double().clone()
            given[of_floats][1] = bad
        with pytest.raises(MetricError, match=f"sample {IDS[1]}"):
            add(make(name), given, [0, 1, 2])


@pytest.mark.parametrize("name", NAMES)
def test_two_values_of_one_sample_are_refused(name):
    metric = whole(name)
    metric.values[0] = torch.cat([metric.values[0], torch.full((metric.columns,), 5.0)])
    for state, number in ((metric.id_high, IDS[0] // 2**20), (metric.id_low, IDS[0] % 2**20)):
        state[0] = torch.cat([state[0], torch.tensor([float(number)])])
    with pytest.raises(MetricError, match=f"sample {IDS[0]}: it occurs twice"):
        metric.compute()


def test_nothing_defined_is_nan():
    for name in ("TokenIoU", "IoUF1"):
        metric = make(name)
        metric.update([torch.ones(2)], [torch.zeros(2)], [0])
        assert metric.compute().isnan() and metric.compute_interval()[3:] == (0, 1)
    metric = metrics.Drift()
    metric.update(torch.ones(1, 3), torch.rand(1, 3), torch.ones(1, 3).bool(), [0])
    assert metric.compute().isnan() and metric.compute_interval()[3:] == (0, 1)


def test_layer_profile_says_what_it_expects():
    with pytest.raises(InputError, match="num_layers is 0"):
        metrics.LayerProfile(num_layers=0)
    with pytest.raises(InputError, match=r"expected \(B, 4, T\)"):
        metrics.LayerProfile(num_layers=4).update(torch.ones(2, 3, 5), torch.ones(2, 5).bool(), [0, 1])


def test_they_work_in_a_collection():
    scores, gold = inputs()["TokenF1"]
    together = MetricCollection([metrics.TokenF1(), metrics.TokenIoU(), metrics.IoUF1(), metrics.AUPRC()])
    together.update(scores=scores, rationale=gold, sample_id=IDS)
    assert together.compute() == {name: whole(name).compute() for name in ("TokenF1", "TokenIoU", "IoUF1", "AUPRC")}


SHARES = {  # what each of two ranks sees: uneven and repeated; and nothing at all on the second rank
    "repeated": ([0, 1, 2, 3, 4, 5, 6], [7, 8, 0, 3]),
    "empty": (list(range(B)), []),
}


def _work(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {}
        for share, chosen in SHARES.items():
            for name, given in inputs().items():
                metric = make(name)
                for i in chosen[rank]:
                    add(metric, given, [i])
                found[share, name] = results(metric)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # the empty rank
def test_two_processes_equal_one(tmp_path):
    expected = {name: results(whole(name)) for name in NAMES}
    started = torch.multiprocessing.start_processes(
        _work, args=(str(tmp_path),), nprocs=2, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 60
    while not started.join(timeout=1):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()
            pytest.fail("the two processes did not finish in 60 s")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (share, name), got in found.items():
            assert got == pytest.approx(expected[name], abs=1e-6), (rank, share, name)
