"""Flows that a run keeps: the agreement table against naive loops, files, the report's picture, and bad settings."""

import base64
import csv
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_bert
from test_cli import TINY
from test_lig import composed_by_hand, gpt2, with_biases
from test_render import HOSTILE

from calig.pipeline.attribution import ExplainableModel, attribute
from calig.pipeline.attribution.agreement import CONFIGURATIONS, MEASURES, ZERO_NODES, Configuration, block_agreement
from calig.pipeline.attribution.within_block import take_apart
from calig.pipeline.cli import main
from calig.pipeline.flow_rows import ALL, marked, read_agreement, remarks, write_agreement
from calig.pipeline.flow_summary import agreement_rows, show
from calig.pipeline.records import read_rows
from calig.pipeline.render.flow import MAX_BYTES, STRONGEST, flow_pictures, shares
from calig.pipeline.render.report import render_report
from calig.pipeline.render.rows import FlowSample, ReportData

# --- agreement


def naive(direct, composed):
    """Means over targets of the four measures, column by column in plain Python."""
    found = []
    for j in range(len(direct)):
        a, b = [[float(row[j]) for row in flow] for flow in (direct, composed)]
        sizes = [sum(map(abs, column)) for column in (a, b)]
        middle = [sum(column) / len(column) for column in (a, b)]
        covariance = sum((x - middle[0]) * (y - middle[1]) for x, y in zip(a, b))
        spreads = [math.sqrt(sum((x - mean) ** 2 for x in column)) for column, mean in zip((a, b), middle)]
        found.append(
            (
                math.dist(a, b),
                math.dist([x / sizes[0] for x in a], [y / sizes[1] for y in b]),
                covariance / (spreads[0] * spreads[1]),
                sum(b) / sum(a),
            )
        )
    return [sum(column) / len(column) for column in zip(*found)]


def test_every_configuration_equals_the_methods_own_flows_put_together_by_hand():
    model, batch = with_biases(make_bert(2, spread=0.6, dtype=torch.float64), std=0.3), make_batch((6,))
    found = attribute(model, batch, "lig", steps=ZERO_NODES, agreement=True).parts["agreement"]
    assert found.shape == (1, 2, len(CONFIGURATIONS), len(MEASURES)) and len(CONFIGURATIONS) == 24

    def parts(**options):
        return attribute(model, batch, "lig", steps=ZERO_NODES, **options).parts

    names = ("itb", "itb_map_ratio", "itb_zero_ratio", "zero")
    by_baseline = {name: parts(baseline=name) for name in names}
    mlp = {name: parts(mlp_baseline=name)["mlp"] for name in ("att_itb_a0", "zero")}
    for place, names in enumerate(CONFIGURATIONS):
        for layer in range(2):
            direct = by_baseline[names.direct]["layer"][0, layer].double()
            composed = composed_by_hand(by_baseline[names.attention]["att"][0, layer], mlp[names.mlp][0, layer])
            shares = [refused_by_hand(by_baseline, names.direct, "layer", layer)]
            shares += [refused_by_hand(by_baseline, names.attention, "att", layer)]
            expected = [*naive(direct, composed), 0.0, *shares]
            assert found[0, layer, place].tolist() == pytest.approx(expected, rel=2e-3, abs=2e-3), names
    counted = found[..., [MEASURES.index("refused"), MEASURES.index("refused_attention")]]
    assert (counted > 0).flatten(0, 2).any(0).all() and (counted < 1).all()


def refused_by_hand(parts, baseline, part, layer):
    """Share of the columns whose self share is no share."""
    if baseline != "itb_zero_ratio":
        return 0.0
    maps = parts["zero"][part][0, layer].reshape(-1, 6, 6)
    ratios = [float(one[j, j] / one[:, j].sum()) for one in maps for j in range(6)]
    return sum(not 0 <= r <= 1 for r in ratios) / len(ratios)


def test_blocks_with_their_norm_in_front_leave_out_what_is_ill_posed():
    wrapped = ExplainableModel(gpt2())
    with wrapped.session():
        block = take_apart(wrapped, wrapped.prepare(make_batch((6,))), 0)[1]
        tables = {kind: block_agreement(block, 16, kind, 4096) for kind in ("heads", "slices")}
    for kind, table in tables.items():
        for names, values in zip(CONFIGURATIONS, table):
            possible = names.direct == "itb" and names.attention in ("itb", "itb_map_ratio")
            possible &= kind == "heads" or names.mlp == "att_itb_a0"
            assert bool(values[1].isfinite()) == possible, (kind, names)
            # Nothing flows into the first token of a decoder but itself.
            assert not possible or float(values[MEASURES.index("vanished")]) == pytest.approx(1 / 6), (kind, names)


def test_agreement_is_as_before_whatever_stands_beside_it():
    model, batch = make_bert(2), make_batch((7, 5))
    both = attribute(model, batch, "lig", agreement=True)
    alone = attribute(model, batch, "lig")
    assert torch.equal(both.flow, alone.flow) and "agreement" not in alone.parts
    row = {key: value[1:, :5] for key, value in batch.items()}
    one = attribute(model, row, "lig", agreement=True).parts["agreement"]
    assert torch.allclose(one[0], both.parts["agreement"][1], atol=1e-4)


# --- rows


def row_of(values, layers=(0, 2), shares=(0.0, 0.0, 0.0)):
    """A sample whose first configuration has these normalised L2 by layer; the others have none."""
    table = torch.full((len(layers), len(CONFIGURATIONS), len(MEASURES)), torch.nan)
    table[:, 0] = torch.tensor([[10 * value, value, 1 - value, 2 * value, *shares] for value in values])
    return {"method": "lig", "layers": list(layers), "agreement": table.tolist()}


def test_rows_are_means_over_samples_with_their_interval(tmp_path):
    flows = [row_of([0.1, 0.3]), row_of([0.3, math.nan]), {"method": "lig", "layers": [0, 2], "agreement": None}]
    rows = agreement_rows(flows)
    assert [row[:5] for row in rows] == [("lig", *CONFIGURATIONS[0], layer) for layer in ("1", "3", ALL)]
    first, third, overall = rows
    assert (first.normalised, first.raw, first.correlation, first.ratio) == pytest.approx((0.2, 2, 0.8, 0.4))
    assert (first.samples, third.samples, overall.samples) == (2, 1, 2)
    assert overall.normalised == pytest.approx((0.2 + 0.3) / 2) and third.normalised == pytest.approx(0.3)
    assert first.low <= first.normalised <= first.high and third.low == pytest.approx(third.high)
    write_agreement(tmp_path / "a.csv", rows)
    for found, row in zip(read_agreement(tmp_path / "a.csv"), rows, strict=True):
        assert found[:5] == row[:5] and list(found[5:]) == pytest.approx(list(row[5:]))
    assert agreement_rows(flows[2:]) == [] and read_agreement(tmp_path / "none.csv") == []


def test_the_best_configuration_stands_first():
    one, other = row_of([0.5], (0,)), row_of([0.5], (0,))
    other["agreement"][0][3] = [0.1, 0.1, 1.0, 1.0, 0.0, 0.0, 0.0]
    rows = agreement_rows([one, other])
    assert rows[0][1:4] == CONFIGURATIONS[3] and rows[-1][1:4] == CONFIGURATIONS[0]
    assert isinstance(CONFIGURATIONS[3], Configuration)


def test_columns_that_kept_itb_or_vanish_are_counted_and_said(tmp_path):
    first = [row_of([0.2, 0.4], shares=(0.25, 1.0, 0.5)), row_of([0.2, 0.4], shares=(0.75, 0.0, 0.002))]
    rows = agreement_rows(first)
    for row in rows:
        assert (row.vanished, row.refused, row.refused_attention) == pytest.approx((0.5, 0.5, 0.251))
    assert marked(("one", "other", "mlp"), rows[0]) == ("one*", "other*", "mlp")
    assert marked(("one", "other", "mlp"), rows[0]._replace(refused=0.0)) == ("one", "other*", "mlp")
    said = remarks(rows)
    assert "25 to 50 % of the columns" in said[0] and said[0].startswith("*") and "50 % of the targets" in said[1]
    assert "<1 %" in remarks([row._replace(refused=0.0, refused_attention=0.001) for row in rows])[0]
    printed = []
    console = SimpleNamespace(table=lambda *table: printed.append(table))
    show(SimpleNamespace(console=console, directory=tmp_path), rows)
    (_, _, lines, note) = printed[0]
    assert lines[0][0] == "itb* = itb* + itb_a0" and note.splitlines()[:2] == said
    page = render_report(ReportData(title="a run", agreement=rows))
    names = CONFIGURATIONS[0]
    assert f"{names.direct}* <small>{names.attention}*, {names.mlp}</small>" in page
    assert all(f"{one}. " in page for one in said)
    plain = agreement_rows([row_of([0.2, 0.4])])
    assert remarks(plain) == []
    assert f"{names.direct} <small>" in render_report(ReportData(title="a run", agreement=plain))


# --- the picture


def sample(tokens=("[CLS]", "a", "b"), blocks=2, sample_id=7):
    generator = torch.Generator().manual_seed(0)
    flow = torch.randn(blocks, len(tokens), len(tokens), generator=generator)
    return FlowSample(sample_id, tokens, list(range(blocks)), flow.tolist())


def test_shares_divide_each_column_by_its_magnitude():
    assert shares([[1.0, 0.0], [-3.0, 0.0]]) == [[0.25, 0.0], [-0.75, 0.0]]


def test_the_picture_stands_without_a_script_and_carries_every_block():
    one = sample(tuple(f"t{i}" for i in range(12)))
    (picture,) = flow_pictures([one])
    assert picture.svg.count("<path") <= STRONGEST * 12
    last = shares(one.flow[-1])
    strongest = max(abs(value) for row in last for value in row)
    widths = [float(width) for width in re.findall(r'stroke-width="([\d.]+)"', picture.svg)]
    assert widths == sorted(widths) and widths[-1] == pytest.approx(0.5 + 5 * strongest, abs=0.06)
    for block, packed in zip(one.flow, picture.data["shares"], strict=True):
        scale, text = packed.split()
        levels = [byte - 256 if byte > 127 else byte for byte in base64.b64decode(text)]
        exact = [value for row in shares(block) for value in row]
        assert [float(scale) * level / 127 for level in levels] == pytest.approx(exact, abs=float(scale) / 200)


def test_a_page_with_flows_is_safe_and_one_without_has_no_section():
    page = render_report(ReportData(title="a run", flows=[sample(tuple(HOSTILE))]))
    assert '<section id="flow">' in page and "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page and "<img src=x" not in page
    data = json.loads(re.search(r'id="flow-data">(.*?)</script>', page, re.S)[1])
    assert data["samples"][0]["tokens"] == list(HOSTILE)
    assert '<section id="flow">' not in render_report(ReportData(title="a run"))


def test_many_long_samples_are_cut_to_the_room_there_is():
    long = sample(tuple(f"t{i}" for i in range(120)), blocks=12)
    pictures = flow_pictures([long] * 20)
    sizes = [len(picture.svg) + sum(map(len, picture.data["shares"])) for picture in pictures]
    assert 1 <= len(pictures) < 20 and sum(sizes) <= MAX_BYTES


# --- a run

RUN = [
    *(item for item in TINY if not item.startswith(("explain.methods", "stages"))),
    "explain.methods=[lig,random]",
    "explain.flows=3",
    "explain.steps=4",
    "explain.metrics=[]",
    "explain.options.lig.agreement=true",
    "probe.enabled=false",
    "logger.wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    assert main(["run", f"run.dir={folder}", *RUN, "stages=[fit,explain,report]"]) == 0
    return folder


def test_a_run_keeps_flows_table_and_picture(run_dir):
    explained = {row["sample_id"]: row for row in read_rows(run_dir / "explanations") if row["method"] == "lig"}
    flows = {row["sample_id"]: row for row in read_rows(run_dir / "flow")}
    assert flows.keys() == explained.keys() and {row["method"] for row in flows.values()} == {"lig"}
    kept = {number: row for number, row in flows.items() if row["flow"] is not None}
    assert len(kept) == 3
    for number, row in kept.items():
        tokens = len(explained[number]["tokens"])
        assert torch.tensor(row["flow"]).shape == (2, tokens, tokens) and row["layers"] == [0, 1]
    with (run_dir / "flow_agreement.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 24 * 3 and {row["layer"] for row in table} == {"1", "2", "all"}
    assert {"vanished", "refused", "refused_attention"} <= table[0].keys()
    assert {int(row["samples"]) for row in table} == {len(explained)}
    page = (run_dir / "report.html").read_text()
    assert page.count("<figure><figcaption>") == 3 and "Do attention and MLP add up" in page
    log = (run_dir / "log.txt").read_text()
    assert "normalised L2 between the whole block and attention with MLP" in log and "itb = itb + itb_a0" in log
    manifests = [json.loads(path.read_text()) for path in (run_dir / "manifest").glob("*.json")]
    assert {file.split("/")[0] for one in manifests for file in one["files"]} == {"explanations", "metrics", "flow"}


def test_flows_are_left_out_unless_asked_for(run_dir, tmp_path):
    settings = [item for item in RUN if not item.startswith(("explain.flows", "explain.options"))]
    folder = tmp_path / "run"
    model = f"model.checkpoint={run_dir / 'model'}"
    assert main(["run", f"run.dir={folder}", *settings, model, "stages=[explain,report]"]) == 0
    assert not (folder / "flow").exists() and not (folder / "flow_agreement.csv").exists()
    assert '<section id="flow">' not in (folder / "report.html").read_text()


def test_the_experiment_takes_any_text_column_without_labels(run_dir, tmp_path):
    texts = tmp_path / "sentences.csv"
    texts.write_text("id,sentence\n" + "".join(f"{i},the soup was not good at table {i}\n" for i in range(6)))
    data = ["data=files", f"data.path={texts}", "data.columns.text=sentence", "explain.split=test"]
    model, folder = f"model.name={run_dir / 'model'}", tmp_path / "run"
    few = ["explain.num_samples=4", "explain.steps=4", "explain.flows=2", "logger=none", "trainer=cpu"]
    assert main(["run", "experiment=lig_flow", model, *data, *few, f"run.dir={folder}"]) == 0
    rows = list(read_rows(folder / "flow"))
    assert [len(rows), sum(row["flow"] is not None for row in rows)] == [4, 2]
    assert {row.samples for row in read_agreement(folder / "flow_agreement.csv")} == {4}
    assert '<section id="flow">' in (folder / "report.html").read_text()


def test_a_negative_number_of_flows_is_refused(capsys):
    assert main(["run", "explain.flows=-1"]) == 2
    assert "explain.flows: expected int >= 0" in capsys.readouterr().err
