"""Concept sensitivity: vectors against scikit-learn, S against a loop, planted concepts, and what a run leaves."""

import json

import pytest
import torch
from conftest import make_batch, make_bert
from test_cli import TINY
from torch import nn

from calig.pipeline.attribution import ClassLogit, ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.concepts import activation_vectors, pooled_states, weighted_gradients
from calig.pipeline.cli import main
from calig.pipeline.compose import compose
from calig.pipeline.concept_rows import ConceptRow, read_concepts, write_concepts
from calig.pipeline.concept_testing import chosen_layers, concept_rows
from calig.pipeline.errors import InputError
from calig.pipeline.metrics.welch import regularised_incomplete_beta, t_two_sided, welch_test

# --- vectors


@pytest.mark.parametrize(("examples", "width"), [(40, 6), (12, 30)])
def test_vectors_are_those_of_scikit_learn(examples, width):
    linear = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, examples, width, generator=generator) * 3 + 1
    second = torch.randn(3, examples, width, generator=generator) * 3 + 0.3
    found = activation_vectors(first, second, seed=5, penalty=0.7)
    assert torch.allclose(found.vectors.norm(dim=1), torch.ones(3, dtype=torch.double))
    held_out = round(examples / 3)
    for pair in range(3):
        cut = torch.Generator().manual_seed(5)
        orders = [torch.randperm(examples, generator=cut) for _ in range(2)]
        sets = [states[pair].double() for states in (first, second)]
        fit = torch.cat([one[order[held_out:]] for one, order in zip(sets, orders, strict=True)])
        test = torch.cat([one[order[:held_out]] for one, order in zip(sets, orders, strict=True)])
        centre, scale = fit.mean(dim=0), (fit - fit.mean(dim=0)).square().mean().sqrt()
        labels = [1] * (examples - held_out) + [0] * (examples - held_out)
        reference = linear.LogisticRegression(C=0.7, tol=1e-10, max_iter=10_000)
        reference.fit(((fit - centre) / scale).numpy(), labels)
        normal = torch.from_numpy(reference.coef_[0])
        assert torch.allclose(found.vectors[pair], normal / normal.norm(), atol=1e-5)
        right = reference.score(((test - centre) / scale).numpy(), [1] * held_out + [0] * held_out)
        assert float(found.accuracy[pair]) == pytest.approx(right)


def test_vectors_of_separable_and_of_equal_sets():
    torch.manual_seed(0)
    apart = activation_vectors(torch.randn(1, 30, 4) + 50 * torch.eye(4)[2], torch.randn(1, 30, 4))
    assert float(apart.vectors[0, 2]) > 0.99 and float(apart.accuracy) == 1
    same = torch.ones(1, 6, 4)
    assert torch.equal(activation_vectors(same, same).vectors, torch.zeros(1, 4, dtype=torch.double))
    flipped = activation_vectors(torch.randn(2, 9, 4) * 1e-3, torch.randn(2, 9, 4) * 1e3)
    assert flipped.vectors.isfinite().all()


@pytest.mark.parametrize("shapes", [((1, 2, 4), (1, 2, 4)), ((1, 5, 4), (1, 6, 4)), ((5, 4), (5, 4))])
def test_sets_that_do_not_fit(shapes):
    with pytest.raises(InputError, match="expected two times"):
        activation_vectors(*map(torch.randn, shapes))


# --- sensitivity


def naive_sensitivity(model, batch, target, vector, weights):
    """S(x) at every layer by the formula: one example, one layer, one token at a time, without the engine."""
    found = []
    for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        one = {key: batch[key][row : row + 1, :length] for key in ("input_ids", "attention_mask")}
        output = model(**one, output_hidden_states=True, output_attentions=True)
        states = output.hidden_states
        gradients = torch.autograd.grad(output.logits[0, target[row]], states)
        own, product = [], torch.eye(length)
        for layer, attention in enumerate(output.attentions):
            head_mean = attention[0].mean(dim=0)
            shares = {"attention": head_mean[0], "rollout": product[0], "mean": torch.full((length,), 1 / length)}
            own.append(sum(shares[weights][i] * (gradients[layer][0, i] @ vector) for i in range(length)).item())
            product = (0.5 * head_mean + 0.5 * torch.eye(length)) @ product
        found.append(own)
    return torch.tensor(found)


@pytest.mark.parametrize("weights", ["attention", "rollout", "mean"])
def test_sensitivity_is_the_loop_over_tokens(weights):
    model, batch = make_bert(attention="eager"), make_batch()
    vector = nn.functional.normalize(torch.randn(24, generator=torch.Generator().manual_seed(1)), dim=0)
    target = torch.tensor([2, 0, 1])
    wrapped = ExplainableModel(model)
    with wrapped.session():
        gradients = weighted_gradients(wrapped, wrapped.prepare(batch), ClassLogit(target), weights)
    assert gradients.shape == (3, 3, 24)
    expected = naive_sensitivity(model, batch, target, vector, weights)
    assert torch.allclose(gradients.float() @ vector, expected, atol=1e-5)
    assert expected.abs().min() > 1e-4


def test_states_are_means_over_real_tokens(bert, batch):
    wrapped = ExplainableModel(bert)
    with wrapped.session():
        found = pooled_states(wrapped, wrapped.prepare(batch))
    with torch.no_grad():
        states = bert(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states
    for row, length in enumerate((9, 6, 8)):
        for layer in range(3):
            assert torch.allclose(found[row, layer].float(), states[layer][row, :length].mean(dim=0), atol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("weights", ["attention", "rollout", "mean"])
def test_neither_batch_nor_padding_matters(bert, weights):
    def run(batch, rows, **options):
        wrapped = ExplainableModel(bert, **options)
        with wrapped.session():
            inputs = wrapped.prepare(batch)
            goal = ClassLogit(torch.tensor([1, 0, 2])[rows])
            return weighted_gradients(wrapped, inputs, goal, weights), pooled_states(wrapped, inputs)

    whole = run(make_batch(), [0, 1, 2], max_tokens_per_pass=9)
    padded = run(make_batch(width=17), [0, 1, 2])
    for one, other in zip(whole, padded, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    single = run({key: value[1:2] for key, value in make_batch().items()}, [1])
    for one, other in zip(whole, single, strict=True):
        assert torch.allclose(one[1:2], other, atol=1e-5)


def test_weights_that_do_not_exist(bert, batch):
    wrapped = ExplainableModel(bert)
    with wrapped.session(), pytest.raises(InputError, match="weights takes 'attention', 'rollout' or 'mean', got 'x'"):
        weighted_gradients(wrapped, wrapped.prepare(batch), ClassLogit(torch.zeros(3, dtype=torch.long)), "x")


# --- tests of significance


def test_welch_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 10, 90):
        for shift, spread in ((0.0, 1.0), (0.3, 1e-3), (2.0, 20.0), (1e3, 1.0)):
            a = (torch.randn(size, generator=generator).double() * spread + shift).tolist()
            b = torch.randn(10, generator=generator).double().tolist()
            found, known = welch_test(a, b), stats.ttest_ind(a, b, equal_var=False)
            assert found.t == pytest.approx(known.statistic, rel=1e-9)
            assert found.df == pytest.approx(known.df, rel=1e-9)
            assert found.p == pytest.approx(known.pvalue, rel=1e-8)


def test_the_beta_integral_is_that_of_scipy():
    special = pytest.importorskip("scipy.special")
    for a in (0.5, 1, 4.5, 300):
        for b in (0.5, 1, 7.25, 80):
            for x in (0.0, 1e-9, 0.1, 0.5, 0.83, 1 - 1e-9, 1.0):
                assert regularised_incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-9)
    assert t_two_sided(0.0, 5) == pytest.approx(1) and t_two_sided(1e6, 50) > 0


def test_welch_of_lists_that_do_not_vary():
    assert welch_test([1, 1], [1, 1, 1]) == (0.0, float("inf"), 1.0)
    assert welch_test([0, 0], [1, 1, 1]) == (-float("inf"), float("inf"), 0.0)
    assert welch_test([1] * 10, [0.0, 1.0] * 20).p < 1e-5
    for wrong in ([1.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match="two finite values or more"):
            welch_test(wrong, [1.0, 2.0])


class Reads(nn.Module):
    """Embeddings, blocks that do nothing, and a head that reads one direction of the mean state: class 1 along it."""

    def __init__(self, width=8, tokens=40):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.head = nn.Linear(width, 2)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(tokens, width, generator=torch.Generator().manual_seed(3)))
            self.embedding.weight[:30, 0] -= self.embedding.weight[:30, 0].mean()
            self.embedding.weight[30] = 12 * torch.eye(width)[0]  # a token of the direction that the head reads,
            self.embedding.weight[31] = 12 * torch.eye(width)[1]  # of one that it does not,
            self.embedding.weight[32] = -12 * torch.eye(width)[0]  # and of the opposite
            for block in self.blocks:
                block.weight.copy_(torch.eye(width))
                block.bias.zero_()
            self.head.weight.zero_()
            self.head.bias.zero_()
            self.head.weight[1, 0] = 1.0

    def forward(self, input_ids, attention_mask):
        state = self.embedding(input_ids)
        for block in self.blocks:
            state = block(state)
        mask = attention_mask[..., None]
        return self.head((state * mask).sum(dim=1) / mask.sum(dim=1))


def planted():
    """Rows of test_concepts with three concepts: the direction that the head reads, another one, the opposite."""
    generator = torch.Generator().manual_seed(11)
    wrapped = ExplainableModel(Reads())

    def texts(token=None):
        ids = torch.randint(0, 30, (120, 6), generator=generator)
        if token is not None:
            ids[:, 2] = token
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with wrapped.session():
        sets = {
            name: pooled_states(wrapped, wrapped.prepare(texts(token))).view(10, 12, 2, 8)
            for name, token in (("random", None), ("read", 30), ("other", 31), ("opposite", 32))
        }
        inputs = wrapped.prepare(texts())
        predicted = wrapped.logits(inputs).argmax(dim=1)
        gradients = weighted_gradients(wrapped, inputs, ClassLogit(predicted), "mean")
    random = sets.pop("random")
    classes = {"yes": predicted == 1, "never": predicted == 5}
    return concept_rows(sets, random, gradients, classes, layers=[0, 1])


def test_a_planted_concept_is_found_and_an_unrelated_one_is_not():
    rows = {(row.concept, row.layer): row for row in planted()}
    assert len(rows) == 6 and {row.target for row in rows.values()} == {"yes"}
    for layer in (0, 1):
        read, other, opposite = (rows[name, layer] for name in ("read", "other", "opposite"))
        assert (read.share, read.significant, read.cav_accuracy) == (1.0, True, 1.0)
        assert (opposite.share, opposite.significant) == (0.0, True)
        assert read.sensitivity > 0 > opposite.sensitivity
        assert not other.significant and other.cav_accuracy > 0.95  # it is there to be seen, the head does not look
        assert other.p_bonferroni == pytest.approx(min(1, 2 * other.p))
        assert read.random_share == pytest.approx(0.5)  # each pair of random sets counts in both directions
        assert read.inputs == other.inputs > 20


def test_a_concept_that_says_nothing_is_found_as_rarely_as_the_level_promises():
    def found(trial, *, disjoint):
        generator = torch.Generator().manual_seed(trial)
        random, draws = torch.randn(2, 10, 20, 1, 24, generator=generator)
        gradients = torch.randn(40, 1, 24, generator=generator) * 0.3 + torch.eye(24)[0]
        draws = draws if disjoint else draws[:1].expand_as(draws)
        every = {"class": torch.ones(40, dtype=torch.bool)}
        (row,) = concept_rows({"nothing": draws}, random, gradients, every, layers=[0], seed=trial)
        return row.significant

    trials = 60
    assert sum(found(trial, disjoint=True) for trial in range(trials)) <= 0.1 * trials
    # Why the sets are drawn anew: with one set of examples for all vectors the test would promise what it cannot keep.
    assert sum(found(trial, disjoint=False) for trial in range(trials)) >= 0.2 * trials


def test_layers_that_do_not_exist():
    assert chosen_layers(None, 3) == [0, 1, 2] and chosen_layers([2, 0], 3) == [0, 2]
    with pytest.raises(InputError, match=r"concepts.layers=\[0, 3\] names layer 3; the model has 3 blocks"):
        chosen_layers([0, 3], 3)


def test_rows_survive_the_file(tmp_path):
    rows = planted()
    write_concepts(tmp_path / "concepts.csv", rows)
    for found, row in zip(read_concepts(tmp_path / "concepts.csv"), rows, strict=True):
        assert [type(value) for value in found] == [type(value) for value in row]
        assert found == row._replace(
            **{name: pytest.approx(value) for name, value in row._asdict().items() if type(value) is float}
        )
    header = (tmp_path / "concepts.csv").read_text().splitlines()[0].split(",")
    assert header[:5] == ["concept", "layer", "class", "share", "sensitivity"]
    assert read_concepts(tmp_path / "none.csv") == []


# --- a run

SETS = "concepts.sets={positive: {sentiment_words: positive}, negated: {negation: present}}"
RUN = [*TINY, SETS, "data.size.train=600", "concepts.set_size=12", "logger.wandb.mode=disabled", "probe.enabled=false"]
RUN.remove("data.size.train=96")
STAGES = "stages=[fit,concepts,report]"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts") / "run"
    assert main(["run", f"run.dir={folder}", *RUN, STAGES]) == 0
    return folder


def test_a_run_leaves_table_scalars_and_plot(run_dir):
    rows = read_concepts(run_dir / "concepts.csv")
    targets = {row.target for row in rows}
    assert {(row.concept, row.target, row.layer) for row in rows} == {
        (concept, target, layer) for concept in ("positive", "negated") for target in targets for layer in (0, 1)
    }
    assert targets and targets <= {"negative", "positive"}
    assert sum(row.inputs for row in rows if (row.concept, row.layer) == ("positive", 0)) == 24
    for row in rows:
        assert isinstance(row, ConceptRow) and 0 <= row.share <= 1 and 0 <= row.p <= row.p_bonferroni <= 1
        assert row.significant == (row.p_bonferroni < 0.05) and 0 <= row.cav_accuracy <= 1
    summary = json.loads((run_dir / "summary.json").read_text())
    for target in targets:
        marked = sum(row.significant for row in rows if (row.concept, row.target) == ("negated", target))
        assert summary[f"concepts/negated/{target}/significant_layers"] == marked
    page = (run_dir / "report.html").read_text()
    assert '<section id="concepts">' in page and "accuracy of the vectors" in page
    log = (run_dir / "log.txt").read_text()
    assert "share of inputs that the concept supports" in log and "random sets from the train split" in log


def test_a_run_is_continued_with_other_concepts_and_repeats_itself(run_dir, tmp_path):
    texts = tmp_path / "glad.txt"
    texts.write_text("".join(f"the soup was charming and lovely at table {i} .\n\n" for i in range(15)))
    table = tmp_path / "sad.csv"
    table.write_text("text\n" + "".join(f"the soup was terrible at table {i}\n" for i in range(15)))
    folder = tmp_path / "run"
    common = [f"model.checkpoint={run_dir / 'model'}", f"run.dir={folder}", *RUN[:-1], "stages=[concepts]"]
    common = [item for item in common if item not in (SETS, "explain.batch_size=4")]
    sets = f"concepts.sets={{glad: {texts}, sad: {table}}}"
    options = ["concepts.weights=mean", "concepts.layers=[1]", "concepts.target=1", "concepts.num_samples=20"]
    found = []
    for again in ([], ["run.overwrite=true", "explain.batch_size=7"]):
        assert main(["run", *common, sets, *options, *again]) == 0
        found.append(read_concepts(folder / "concepts.csv"))
    assert {(row.concept, row.target, row.layer) for row in found[0]} == {
        ("glad", "positive", 1),
        ("sad", "positive", 1),
    }
    for one, other in zip(*found, strict=True):
        assert one.share == other.share and one.sensitivity == pytest.approx(other.sensitivity, abs=1e-5)
        assert one.cav_accuracy > 0.8  # texts of one form are easily told from others
    assert "glad, sad: fewer than 10 * 12 texts, draws share some" in (folder / "log.txt").read_text()


MISTAKES = {
    "no sets": (["concepts.sets={}"], "concepts.sets: expected at least one concept"),
    "column": (["concepts.sets={a: {colour: red}}"], "unknown column 'colour'", "sentiment_words", "concepts.sets.a"),
    "value": (["concepts.sets={a: {negation: presnt}}"], "value of column 'negation' 'presnt'", "'present'"),
    "file": (["concepts.sets={a: no.txt}"], "concepts.sets.a=no.txt: there is no such file"),
    "empty": (["concepts.sets={a: empty.txt}"], "concepts.sets.a=empty.txt: it holds no text"),
    "few": (["concepts.sets={a: few.txt}"], "concepts.sets.a=few.txt has 3 examples; at least 10"),
    "two columns": (["concepts.sets={a: {x: y, z: y}}"], "concepts.sets.a: expected a file, or one {column: value}"),
    "random": (
        ["concepts.sets={a: many.txt}", "concepts.set_size=60", "data.size.train=100"],
        "the train split has 100 texts, too few for random sets of 60: at least 120",
    ),
    "few random sets": (["concepts.random_sets=5"], "concepts.random_sets: expected int >= 10, got 5"),
    "class": (["concepts.target=2"], "concepts.target=2 names no class: the model has 2"),
    "layer": (["concepts.layers=[0,2]"], "concepts.layers=[0, 2] names layer 2; the model has 2 blocks"),
    "no layer": (["concepts.layers=[]"], "concepts.layers: expected at least one, or null"),
    "attention": (["model.scratch.type=deberta-v2"], "concepts.weights=attention needs attention maps", "weights=mean"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_with_2_before_the_training(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "few.txt").write_text("good\nbetter\nbest\n")
    (tmp_path / "many.txt").write_text("".join(f"good thing {i}\n" for i in range(60)))
    settings, *words = MISTAKES[case]
    keys = {setting.split("=")[0] for setting in settings}
    given = [item for item in RUN if item.split("=")[0] not in keys]
    assert main(["run", "run.dir=run", *given, *settings, STAGES]) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == [], error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


def test_the_stage_runs_only_where_it_is_asked_for():
    assert "concepts" not in compose([], check=False).stages
    assert "concepts" in compose(["experiment=concepts"], check=False).stages


def test_families_without_attention_maps_take_plain_tcav():
    wrapped = ExplainableModel(Reads())
    batch = {key: value for key, value in make_batch().items() if key != "special_tokens_mask"}
    batch["input_ids"] = batch["input_ids"] % 40
    with wrapped.session():
        inputs, goal = wrapped.prepare(batch), ClassLogit(torch.ones(3, dtype=torch.long))
        with pytest.raises(UnsupportedModelError, match="attention interface"):
            weighted_gradients(wrapped, inputs, goal)
        found = weighted_gradients(wrapped, inputs, goal, "mean")
    # The mean over n tokens of a gradient that is 1/n of the head's row at each.
    expected = torch.eye(8)[0] / torch.tensor([9.0, 6, 8])[:, None, None]
    assert torch.allclose(found.float(), expected.expand(3, 2, 8), atol=1e-6)
