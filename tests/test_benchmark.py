"""The stage benchmark: every number against one computed by hand or naively, failures, limits of methods, the page."""

import csv
import itertools
import json
import math
import os
import re
from statistics import mean

import pytest
import torch
from test_cli import TINY
from wandb_records import read_offline_run

from calig.pipeline import explainer as explainer_module
from calig.pipeline.attribution.methods import available_methods
from calig.pipeline.benchmarking import COLUMNS, BenchmarkRow, benchmark, read_benchmark, write_benchmark
from calig.pipeline.cli import main
from calig.pipeline.compose import compose
from calig.pipeline.metrics import f1_of_means, paired_permutation_test, spearman, spearman_matrix
from calig.pipeline.metrics.comparison import paired_permutation_tests
from calig.pipeline.metrics.names import METRICS, REPEATED_METRICS
from calig.pipeline.metrics.statistics import first_mean
from calig.pipeline.records import EXPLANATION_SCHEMA, read_rows, read_samples, write_table
from calig.pipeline.render.benchmark import benchmark_view
from calig.pipeline.render.labels import metric as label_of
from calig.pipeline.render.leaderboard import leaderboards
from calig.pipeline.render.report import MetricRow, ReportData, render_report
from calig.pipeline.run import RunContext

# numbers by hand

COMPREHENSIVENESS = {
    ("a", "none"): [0.9, 0.8, 0.7, 0.9, 0.8, 0.6, 0.7, 0.9],
    ("b", "none"): [0.5, 0.9, 0.6, 0.4, 0.7, 0.5, 0.8, 0.6],
    ("c", "none"): [0.1, 0.3, 0.1, 0.2, 0.1, 0.3, 0.2, 0.1],
    ("random", "random"): [0.2, 0.2, 0.1, 0.2, 0.1, 0.2, 0.3, 0.1],
    ("a", "reversed"): [0.0] * 8,
}


def metric_row(sample, method, control, metric, value):
    row = {"operator": None, "space": None, "q": None}
    return row | {"sample_id": sample, "method": method, "control": control, "metric": metric, "value": value}


def metric_rows(table=COMPREHENSIVENESS, name="comprehensiveness"):
    return [metric_row(i, *key, name, value) for key, values in table.items() for i, value in enumerate(values)]


def explanation(sample, method, scores, *, label=0, prediction=0, steps=1):
    words = [None, *range(len(scores)), None]
    return {
        "sample_id": sample,
        "method": method,
        "word_ids": words,
        "scores": [99.0, *scores, -99.0],
        "label": label,
        "prediction": prediction,
        "steps_used": steps,
    }


def samples(methods=("a", "b", "c"), lengths=(3, 4, 3, 9, 5, 6, 8, 9)):
    draw = torch.Generator().manual_seed(0)
    return [
        [
            explanation(
                i, name, torch.randn(length, generator=draw).tolist(), label=i % 2, prediction=int(i > 5), steps=i + 1
            )
            for name in methods
        ]
        for i, length in enumerate(lengths)
    ]


def keyed(rows):
    found = {
        (row.method, row.control, row.metric, row.group, row.other * (row.metric == "agreement")): row for row in rows
    }
    assert len(found) == len(rows), "a line is there twice"
    return found


def p_by_enumeration(a, b):
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    swaps = [abs(sum(s * g for s, g in zip(signs, gaps))) for signs in itertools.product((1, -1), repeat=len(gaps))]
    return mean(value >= abs(sum(gaps)) - 1e-9 for value in swaps)


def holm_by_hand(p_values):
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    steps = [min(1.0, (len(order) - place) * p_values[i]) for place, i in enumerate(order)]
    return {i: max(steps[: place + 1]) for place, i in enumerate(order)}


def test_means_differences_and_tests_by_hand():
    found = keyed(benchmark(metric_rows(), samples(), ["a", "b", "c", "random"]))
    others = [("b", "none"), ("c", "none"), ("random", "random")]
    own = COMPREHENSIVENESS["a", "none"]
    p_values = [p_by_enumeration(own, COMPREHENSIVENESS[other]) for other in others]
    for place, other in enumerate(others):
        row = found[(*other, "comprehensiveness", "all", "")]
        assert row.mean == pytest.approx(mean(COMPREHENSIVENESS[other])) and row.n == row.n_paired == 8
        assert row.other == "a" and row.low <= row.mean <= row.high
        assert row.difference == pytest.approx(mean(own) - row.mean)
        assert row.difference_low <= row.difference <= row.difference_high
        assert row.p == pytest.approx(p_values[place])
        assert row.p_adjusted == pytest.approx(holm_by_hand(p_values)[place])
    assert found["b", "none", "comprehensiveness", "all", ""].same == (holm_by_hand(p_values)[0] >= 0.05)
    chance = COMPREHENSIVENESS["random", "random"]
    p_values = [p_by_enumeration(COMPREHENSIVENESS[name, "none"], chance) for name in "abc"]
    for place, name in enumerate("abc"):
        row = found[name, "none", "comprehensiveness", "all", ""]
        assert row.random_p_adjusted == pytest.approx(holm_by_hand(p_values)[place])
        assert row.random_difference == pytest.approx(mean(COMPREHENSIVENESS[name, "none"]) - mean(chance))
        assert row.beats_random == (name in "ab")  # c is as good as chance
    assert found["a", "none", "comprehensiveness", "all", ""].p is None  # the first is held against nobody
    reversed_row = found["a", "reversed", "comprehensiveness", "all", ""]
    assert reversed_row.mean == 0 and reversed_row.p is None and reversed_row.beats_random is None


def test_where_lower_is_better_a_larger_mean_does_not_beat_random():
    found = keyed(benchmark(metric_rows(name="sufficiency"), samples(), ["a", "b", "c"]))
    row = found["a", "none", "sufficiency", "all", ""]
    assert row.random_p_adjusted < 0.05 and row.beats_random is False


def test_methods_are_paired_on_the_samples_of_both():
    """`c` was limited to three samples, and a skipped value leaves its pair."""
    table = [*metric_rows(), metric_row(9, "a", "none", "auprc", None)]
    table = [row for row in table if row["method"] != "c" or row["sample_id"] in (1, 4, 6)]
    found = keyed(benchmark(table, samples(), ["a", "b", "c"]))
    row = found["c", "none", "comprehensiveness", "all", ""]
    assert row.n == row.n_paired == 3
    assert row.difference == pytest.approx(mean([0.8, 0.8, 0.7]) - mean([0.3, 0.1, 0.2]))
    assert row.p == p_by_enumeration([0.8, 0.8, 0.7], [0.3, 0.1, 0.2]) == 0.25
    skipped = found["a", "none", "auprc", "all", ""]
    assert (skipped.n, skipped.n_skipped, skipped.mean) == (0, 1, None)


def test_steps_groups_and_agreement_by_hand():
    rows = samples()
    found = keyed(benchmark(metric_rows(), rows, ["a", "b", "c"]))
    assert found["a", "none", "steps_used", "all", ""].mean == pytest.approx(4.5)
    # Lengths 3 3 4 | 5 6 8 | 9 9: thirds end at the third and the sixth of eight.
    members = {"short": [0, 1, 2], "medium": [4, 5, 6], "long": [3, 7]}
    # Labels alternate 0 1 and the prediction is 1 for the last two samples alone.
    members |= {"right": [0, 2, 4, 7], "wrong": [1, 3, 5, 6]}
    for group, ids in members.items():
        for method, control in (("a", "none"), ("b", "none"), ("random", "random")):
            row = found[method, control, "comprehensiveness", group, ""]
            assert row.mean == pytest.approx(mean(COMPREHENSIVENESS[method, control][i] for i in ids)), group
            assert row.n == len(ids)
    assert found["a", "none", "comprehensiveness", "short", ""].note == "3 to 4 tokens"
    assert found["a", "none", "comprehensiveness", "long", ""].note == "9 to 9 tokens"
    assert ("a", "reversed", "comprehensiveness", "short", "") not in found
    for one, two in itertools.permutations("abc", 2):
        expected = [
            naive_spearman(*(row["scores"][1:-1] for row in sample if row["method"] in (one, two))) for sample in rows
        ]
        row = found[one, "none", "agreement", "all", two]
        assert row.mean == pytest.approx(mean(expected)) and row.n == 8


def naive_spearman(a, b):
    """Without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    ranks = [[sorted(side).index(value) for value in side] for side in (a, b)]
    n = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks)) / (n * (n * n - 1))


def test_texts_of_one_length_one_token_and_without_labels():
    rows = [[explanation(i, name, [0.5], label=None) for name in "ab"] for i in range(4)]
    table = metric_rows({key: values[:4] for key, values in COMPREHENSIVENESS.items()})
    lines = benchmark(table, rows, ["a", "b"])
    assert {row.group for row in lines} == {"all", "short"}  # all samples are in the first third
    assert not [row for row in lines if row.metric == "agreement"]  # one token has no ranking


def test_failures_are_lines_with_the_most_frequent_reason(tmp_path):
    reasons = ["no room", 'is, "not"\nfinite', 'is, "not"\nfinite']
    failures = [{"sample_id": i, "method": "broken", "reason": reason} for i, reason in enumerate(reasons)]
    lines = benchmark(metric_rows(), samples(), ["a", "b", "c", "broken"], failures)
    (line,) = [row for row in lines if row.metric == "failed"]
    assert (line.method, line.n, line.note) == ("broken", 3, reasons[1])
    file = tmp_path / "benchmark.csv"
    write_benchmark(file, lines)
    assert read_benchmark(file) == lines
    with file.open(newline="", encoding="utf8") as stream:
        assert tuple(next(csv.reader(stream))) == COLUMNS
    assert read_benchmark(tmp_path / "none.csv") == []


def test_nothing_in_common_and_nothing_at_all():
    assert benchmark([], [], ["a"]) == []
    table = [row for row in metric_rows() if (row["method"] == "a") == (row["sample_id"] < 4)]
    row = keyed(benchmark(table, samples(), ["a", "b"]))["b", "none", "comprehensiveness", "all", ""]
    assert row.mean is not None and row.p is None and row.difference is None and not row.same


def test_pairs_tested_together_have_the_p_values_of_each_alone():
    draw = torch.Generator().manual_seed(0)
    pairs = []
    for n, columns in ((5, 1), (40, 1), (40, 2), (40, 1), (13, 1)):
        a, b = (torch.rand(n, columns, generator=draw) for _ in range(2))
        pairs.append((a, b, f1_of_means if columns == 2 else first_mean))
    together = paired_permutation_tests(pairs, permutations=500)
    assert together == [paired_permutation_test(*pair, permutations=500) for pair in pairs]
    assert len(set(together)) == len(pairs)


def test_the_matrix_of_rank_correlations_equals_each_pair():
    values = torch.tensor([[1.0, 5.0, 5.0, 2.0], [0.0, 3.0, 1.0, 1.0], [9.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    found = spearman_matrix(values)
    for i, j in itertools.product(range(4), repeat=2):
        expected = spearman(values[i], values[j])
        assert found[i, j].item() == pytest.approx(expected) or (math.isnan(expected) and found[i, j].isnan())


def test_a_sample_comes_whole_though_its_rows_lie_apart(tmp_path):
    rows = [explanation(i, name, [0.1, 0.2]) for name in "ab" for i in range(5)]
    for number, part in enumerate((rows[:2] + rows[5:7], rows[2:5] + rows[7:])):
        write_table(tmp_path / f"part-00000-0000{number}.parquet", part, EXPLANATION_SCHEMA)
    found = list(read_samples(tmp_path, ["sample_id", "method"]))
    assert [[(row["sample_id"], row["method"]) for row in sample] for sample in found] == [
        [(i, "a"), (i, "b")] for i in range(5)
    ]


# the stage

SETTINGS = [
    *(item for item in TINY if not item.startswith(("explain.num", "trainer.max_epochs", "probe."))),
    "trainer.max_epochs=1",
    "probe.enabled=false",
    "explain.num_samples=12",
    "explain.methods=[ca_lig,attention_rollout,input_x_gradient,generic_attention,random]",
    "explain.limits={generic_attention: 5}",
    "explain.steps=4",
    "stages=[fit,explain,benchmark,report]",
]


def run(*arguments):
    environment = dict(os.environ)
    code = main(["run", *arguments])
    os.environ.clear()
    os.environ.update(environment)
    return code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run in which one method fails."""
    folder = tmp_path_factory.mktemp("runs") / "bench"
    attribute = explainer_module.attribute

    def raising(model, batch, name, **named):
        if name == "input_x_gradient":
            raise RuntimeError("<b>no kernel</b>")
        return attribute(model, batch, name, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explainer_module, "attribute", raising)
        assert run(f"run.dir={folder}", *SETTINGS) == 3
    return folder


def test_a_run_with_a_failing_method_compares_the_others(finished):
    found = keyed(read_benchmark(finished / "benchmark.csv"))
    summary = json.loads((finished / "summary.json").read_text())
    for method in ("ca_lig", "attention_rollout", "generic_attention"):
        for metric in ("comprehensiveness", "sufficiency", "token_f1"):
            row = found[method, "none", metric, "all", ""]
            key = f"explain/{method}/{metric}"
            assert (row.mean, row.low, row.high) == (summary[key], summary[f"{key}/low"], summary[f"{key}/high"])
            assert row.n == (5 if method == "generic_attention" else 12)
        assert found[method, "reversed", "comprehensiveness", "all", ""].n == row.n
        assert found[method, "none", "seconds", "all", ""].mean > 0
    assert found["random", "random", "comprehensiveness", "all", ""].n == 12
    assert found["ca_lig", "none", "steps_used", "all", ""].mean == 4
    failed = found["input_x_gradient", "none", "failed", "all", ""]
    assert (failed.n, failed.note) == (12, "RuntimeError: <b>no kernel</b>")
    assert ("input_x_gradient", "none", "comprehensiveness", "all", "") not in found
    assert summary["benchmark/random/agreement"] == found["ca_lig", "none", "agreement", "all", "random"].mean
    assert 0 <= summary["benchmark/ca_lig/beats_random"] <= 1


def test_the_terminal_shows_controls_sizes_marks_and_failures_in_80_columns(finished):
    log = (finished / "log.txt").read_text()
    table = log[log.index("── benchmark") : log.index("── report")].splitlines()
    assert all(len(line.rstrip()) <= 80 for line in table)
    text = "\n".join(table)
    for words in (
        "random (control)",
        "ca_lig reversed",
        "samples",
        "≈ no significant difference from ca_lig",
        "compreh↑",
    ):
        assert words in text, words
    costs = text[text.index("costs per sample") :]
    (line,) = [line for line in costs.splitlines() if line.startswith("generic_attention")]
    assert line.split()[1] == "5" and re.search(r"\d of \d+ metrics$", line)
    assert "failed   input_x_gradient on 12 samples: RuntimeError: <b>no kernel</b>" in text


def test_the_page_has_the_section_and_what_failed_is_text(finished):
    page = (finished / "report.html").read_text()
    section = page[page.index('<section id="benchmark">') : page.index('<section id="samples">')]
    for words in (
        "minus each method",
        "What a method costs",
        "Agreement",
        "By length and by correctness",
        "tokens",
        "p = ",
    ):
        assert words in section, words
    assert "input_x_gradient on 12 samples (RuntimeError: &lt;b&gt;no kernel&lt;/b&gt;)" in section
    assert "<b>no kernel" not in page and "≈" in page[page.index('<section id="metrics">') :]
    assert 'href="#benchmark"' in page


def test_weights_and_biases_has_the_table(finished):
    history = read_offline_run(finished).history
    (row,) = [row for row in history if "benchmark/table/_type" in row]
    assert row["benchmark/table/_type"] == "table-file" and row["benchmark/table/ncols"] == len(COLUMNS)
    (file,) = (finished / "wandb").glob("offline-run-*/files/media/table/benchmark/*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == list(COLUMNS)
    assert len(table["data"]) == len(read_benchmark(finished / "benchmark.csv"))


def test_a_finished_run_is_compared_again_from_its_files_alone(finished, tmp_path, monkeypatch, capsys):
    import shutil

    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "benchmark.csv").read_text()
    (folder / "benchmark.csv").unlink()
    (folder / ".stages.json").write_text(json.dumps({"finished": ["fit", "explain", "report"]}))
    for name in ("data", "module", "trainer"):
        monkeypatch.setattr(RunContext, name, property(lambda self: pytest.fail("nothing is computed anew")))
    assert run(f"run.resume={folder}", "stages=[benchmark]", "logger.wandb.mode=disabled") == 3
    assert (folder / "benchmark.csv").read_text() == before


def test_where_random_is_named_first_the_others_are_held_against_the_first_real_method(finished, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / ".stages.json").write_text(json.dumps({"finished": ["fit", "explain"]}))
    methods = "explain.methods=[random,attention_rollout,ca_lig,input_x_gradient,generic_attention]"
    assert run(f"run.resume={folder}", "stages=[benchmark,report]", methods, "logger.wandb.mode=disabled") == 3
    found = keyed(read_benchmark(folder / "benchmark.csv"))
    assert found["ca_lig", "none", "token_f1", "all", ""].other == "attention_rollout"
    assert "≈ no significant difference from attention_rollout" in capsys.readouterr().out
    assert "attention_rollout minus each method" in (folder / "report.html").read_text()


def test_what_is_kept_with_random_weights_has_no_better_side():
    """-0.8 is no better than 0: both sides of 0 say that the ranking still knows something."""
    assert label_of("randomisation").direction == 0


def test_without_benchmark_the_page_has_no_section():
    assert 'id="benchmark"' not in render_report(ReportData("a run", metrics=[MetricRow("a", "auprc", 0.5)]))


def test_the_marks_of_the_page_are_those_of_the_tests_and_names_are_escaped():
    bad = "<script>alert(1)</script>"
    lines = [
        BenchmarkRow(
            bad, "none", "auprc", difference=0.1, difference_low=-0.1, difference_high=0.3, p=0.2, p_adjusted=0.4
        ),
        BenchmarkRow("a", "none", "agreement", mean=-0.5, n=3, other=bad),
        BenchmarkRow(bad, "none", "agreement", mean=-0.5, n=3, other="a"),
        BenchmarkRow("a", "none", "auprc", "short", 0.5, 0.4, 0.6, 3, note=bad),
        BenchmarkRow(bad, "none", "failed", n=2, note=bad),
    ]
    metrics = [
        MetricRow("a", "auprc", 0.5, beats_random=True),
        MetricRow(bad, "auprc", 0.4, p=0.4, beats_random=False),
        MetricRow("random", "auprc", 0.3, control="random"),
    ]
    page = render_report(ReportData("a run", metrics=metrics, primary_method="a", benchmark=lines))
    assert "<script>alert" not in page and page.count("<script") == 2
    assert 'title="p = 0.400 against a"' in page
    assert "no better than the random ranking" in page  # by the test, though 0.4 > 0.3
    assert "≈ no significant difference from a" in page and "−0.50" in page


def test_a_method_used_on_fewer_samples_is_not_the_best_and_says_so():
    def table(n):
        rows = [MetricRow("a", "auprc", 0.5, n=300), MetricRow("b", "auprc", 0.4, n=300)]
        (found, _) = leaderboards([*rows, MetricRow("few", "auprc", 0.9, 0.8, 1.0, n=n)], "a")
        return {line.name: line.cells[0] for line in found.methods}

    few = table(50)
    assert few["a"].best and not few["few"].best and few["few"].interval == "0.800 to 1.000, n = 50"
    failed = table(290)  # some samples that failed do not take a method out
    assert failed["few"].best and failed["few"].interval == "0.800 to 1.000"


def test_costs_stand_beside_quality_and_a_matrix_numbers_its_columns():
    lines = [
        BenchmarkRow("a_b", "none", "seconds", mean=0.25, n=7),
        BenchmarkRow("a_b", "none", "passes", mean=3.0, n=7),
        BenchmarkRow("a_b", "none", "auprc", mean=0.5, n=5, beats_random=True),
        BenchmarkRow("a_b", "none", "token_f1", mean=0.4, n=5, beats_random=False),
        BenchmarkRow("random", "none", "seconds", mean=0.001, n=7),
        BenchmarkRow("random", "random", "auprc", mean=0.1, n=5),
        BenchmarkRow("a_b", "reversed", "auprc", mean=0.0, n=5),
        BenchmarkRow("a_b", "none", "agreement", mean=-0.5, n=7, other="random"),
        BenchmarkRow("random", "none", "agreement", mean=-0.5, n=7, other="a_b"),
    ]
    costs, agreement = benchmark_view(lines, "a_b").grids
    heads = ["samples", "ms", "passes", "token F1\u00a0↑", "AUPRC\u00a0↑", "beats random"]
    assert [label for label, _ in costs.columns] == heads
    cells = {name: [cell and cell.text for cell in line] for name, line in costs.lines}
    assert cells["a_<wbr>b"] == ["7", "250.0", "3.0", "0.400", "0.500", "1 of 2"]
    assert cells["random"] == ["7", "1.0", None, None, "0.100", None]
    assert [label for label, _ in agreement.columns] == ["1", "2"] and agreement.narrow
    assert [name for name, _ in agreement.lines] == ["1 a_<wbr>b", "2 random"]
    assert agreement.lines[0][1][0] is None and agreement.lines[0][1][1].opposes


# the settings


def test_the_benchmark_experiments_hold_every_method_and_the_sizes_of_the_house():
    for name in ("controlled", "hatexplain", "sst2"):
        config = compose([f"experiment=benchmark_{name}"], check=False)
        chosen = config.explain
        assert set(chosen.methods) == set(available_methods()) and chosen.methods[0] == "ca_lig"
        assert chosen.num_samples == 300 and chosen.operator == ["mask", "delete", "attention"]
        assert set(chosen.metrics) == set(METRICS)
        expected = dict.fromkeys(("infidelity", "sensitivity_max", "randomisation", "shap", "lime"), 50)
        if name != "controlled":
            expected |= {f"{slow}/{again}": 10 for slow in ("shap", "lime") for again in REPEATED_METRICS}
        assert chosen.limits == expected | {"delete": 100, "attention": 100}
        assert config.stages.index("explain") < config.stages.index("benchmark") < config.stages.index("report")


def test_names_of_methods_metrics_and_operators_are_distinct():
    """`explain.limits` has one name space."""
    assert not set(available_methods()) & {*METRICS, "mask", "delete", "attention"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain.limits.lmie=5"], ["explain.limits", "method", "Did you mean 'lime'?"]),
        (["explain.limits.lime=0"], ["explain.limits.lime", "int >= 1 | null"]),
        (["stages=[benchmark,explain]"], ["benchmark reads what explain has written and comes after it"]),
        (["stages=[benchmark]"], ["there is nothing to compare", "Put explain before benchmark"]),
    ],
)
def test_mistakes_end_with_2(arguments, words, tmp_path, capsys):
    assert run(f"run.dir={tmp_path / 'run'}", "logger.wandb.mode=disabled", *arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert len(list(read_rows(tmp_path))) == 0
