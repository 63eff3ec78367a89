import copy
import time

import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import (
    AUPRC,
    Comprehensiveness,
    LogOdds,
    MetricError,
    Sufficiency,
    Summary,
    TokenF1,
    average_precision,
    bootstrap_interval,
    comprehensiveness,
    log_odds,
    sufficiency,
    token_f1,
)


def examples(n):
    generator = torch.Generator().manual_seed(n)
    full, bins = torch.rand(n, generator=generator), torch.rand(n, 5, generator=generator)
    ids = torch.arange(n) * 3 + 2**24 - 2  # across the first odd numbers that float32 cannot hold
    return full, bins, ids


@pytest.mark.parametrize(
    ("kind", "pure"), [(Comprehensiveness, comprehensiveness), (Sufficiency, sufficiency), (LogOdds, log_odds)]
)
def test_batches_add_up_to_the_pure_function(kind, pure):
    full, bins, ids = examples(11)
    metric, values = kind(), pure(full, bins)
    for start in range(0, 11, 4):
        part = slice(start, start + 4)
        assert metric(full[part], bins[part], ids[part]).item() == pytest.approx(values[part].mean().item(), abs=1e-6)
    metric.update(full[2:5], bins[2:5] + 1e-6, ids[2:5].tolist())  # repeated by a sampler, in another batch
    assert metric.compute().item() == pytest.approx(values.mean().item(), abs=1e-6)
    assert metric.compute().dtype == torch.float32
    got = metric.compute_interval(seed=2, resamples=100)
    assert got[:3] == pytest.approx(bootstrap_interval(values, seed=2, resamples=100), abs=1e-6)
    assert got[3:] == (11, 0)
    assert all(state.dim() == 1 and state.dtype == torch.float32 for state in metric.values + metric.id_high)
    metric.reset()
    metric.update(full[:1], bins[:1], ids[:1])
    assert metric.compute().item() == pytest.approx(values[0].item(), abs=1e-6)


@pytest.mark.parametrize(("kind", "pure"), [(TokenF1, token_f1), (AUPRC, average_precision)])
def test_plausibility_classes(kind, pure):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, generator=generator) for n in (3, 6, 2, 9)]
    gold = [torch.tensor([1] + [0] * (len(s) - 1)) for s in scores]
    gold[2] = torch.zeros(2)  # an empty rationale
    metric = kind()
    metric.update(scores, gold, [0, 1, 2, 3])
    metric.update(scores[2:], gold[2:], [2, 3])
    values = torch.tensor([pure(scores[i], gold[i]) for i in (0, 1, 3)])
    assert metric.compute().item() == pytest.approx(values.mean().item(), abs=1e-6)
    assert metric.compute_interval()[3:] == (3, 1)


def test_token_f1_counts_missed_words():
    metric = TokenF1()
    metric.update([torch.tensor([2.0, 1.0])] * 2, [torch.tensor([1, 0]), torch.zeros(2)], [0, 1], missed=[1, 3])
    assert metric.compute().item() == pytest.approx((0.5 + 0.0) / 2)


def test_errors_name_the_sample():
    full, bins, _ = examples(2)
    metric = Comprehensiveness()
    with pytest.raises(MetricError, match="sample 71: Comprehensiveness is nan"):
        metric.update(full.masked_fill(torch.tensor([False, True]), float("nan")), bins, [70, 71])
    metric = Comprehensiveness()
    metric.update(full, bins, [70, 71])
    metric.update(full + 0.01, bins, [70, 72])
    with pytest.raises(MetricError, match="sample 70: it occurs twice"):
        metric.compute()
    with pytest.raises(InputError, match="2 values came with 1 sample ids"):
        Comprehensiveness().update(full, bins, [1])
    with pytest.raises(MetricError, match="sample 5: a word's score"):
        AUPRC().update([torch.tensor([float("nan"), 1.0])], [torch.tensor([1, 0])], [5])


def test_neighbouring_large_ids_stay_apart():
    metric = Comprehensiveness()
    ids = [2**24, 2**24 + 1, 2**43 + 1, 2**43 + 2, 0, 1]
    metric.update(torch.arange(6.0), torch.zeros(6, 2), ids)
    assert metric.compute_interval().n == 6
    with pytest.raises(InputError, match="below"):
        metric.update(torch.ones(1), torch.zeros(1, 2), [2**44])


def test_nothing_defined_is_nan_and_says_so():
    metric = AUPRC()
    metric.update([torch.ones(2)], [torch.zeros(2)], [0])
    assert metric.compute().isnan()
    assert metric.compute_interval() == Summary(None, None, None, 0, 1)


def test_classes_copy_and_pickle():
    import pickle

    full, bins, ids = examples(3)
    metric = Sufficiency()
    metric.update(full, bins, ids)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.compute() == metric.compute()


SHARES = {  # what each of two ranks sees: uneven and repeated; and nothing at all on the second rank
    "repeated": ([0, 1, 2, 3, 4, 5, 6], [7, 8, 0, 3]),
    "empty": ([0, 1, 2, 3, 4, 5, 6, 7, 8], []),
}


def _work(rank, folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        full, bins, ids = examples(9)
        results = {}
        for name, shares in SHARES.items():
            metric, words = Comprehensiveness(), TokenF1()
            for i in shares[rank]:
                metric.update(full[i : i + 1], bins[i : i + 1], ids[i : i + 1])
                words.update([bins[i]], [(bins[i] > 0.5).long()], ids[i : i + 1])
            results[name] = [
                (one.compute().item(), *one.compute_interval(), *one.compute_interval(seed=1))
                for one in (metric, words)
            ]
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    full, bins, ids = examples(9)
    metric, words = Comprehensiveness(), TokenF1()
    metric.update(full, bins, ids)
    words.update(list(bins), [(row > 0.5).long() for row in bins], ids)
    expected = [
        (one.compute().item(), *one.compute_interval(), *one.compute_interval(seed=1)) for one in (metric, words)
    ]
    started = torch.multiprocessing.start_processes(
        _work, args=(str(tmp_path),), nprocs=2, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 30
    while not started.join(timeout=1):
        if time.monotonic() > deadline:
            for process in started.processes:
                process.kill()
            pytest.fail("the two processes did not finish in 30 s")
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name in SHARES:
            for got, want in zip(results[name], expected, strict=True):
                assert got == pytest.approx(want, abs=1e-6)
