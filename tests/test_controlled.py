import os
import random
import subprocess
import sys
import time

import pytest

from calig.datamodules import controlled
from calig.datamodules.controlled import DEFAULT_SIZES, LABELS, NEUTRAL, evaluate, evidence, generate
from calig.pipeline.errors import InputError


@pytest.fixture(scope="module")
def corpus():
    return generate(DEFAULT_SIZES, seed=0)


@pytest.fixture(scope="module")
def rows(corpus):
    return [example for split in corpus.values() for example in split]


# Sentences written by hand; the words in brackets are the evidence.
SENTENCES = [
    (1, "the soup was [good] ."),
    (-1, "the soup was very [bad] ."),
    (-1, "the soup was [not] quite [good] ."),
    (1, "[nobody] found the plot really [dull] ."),
    (-1, "[nothing] about the old hall was [lovely] ."),
    (1, "[nobody] said the hall was [never] [good] ."),
    (-1, "[nobody] said the hall was [not] [hardly] [good] ."),
    (1, "i [doubt] that the novel is [boring] ."),
    (1, "the film was [not] a [disaster] ."),
    (-1, "i did [not] [enjoy] it ."),
    (1, "[although] the soup was terrible , the waiter was [charming] ."),
    (1, "although the soup was not terrible , the waiter was [charming] ."),
    (-1, "the soup was [terrible] , [although] the waiter was charming ."),
    (1, "the soup was terrible [but] the waiter was [charming] ."),
    (1, "the soup was great but the waiter was [charming] ."),
    (1, "[despite] the nasty weather , we [loved] the view ."),
    (1, "[critics] called it boring , we [loved] it ."),
    (1, "we [loved] it ; [critics] said it was not good ."),
    (1, "critics called it boring but we [loved] it ."),  # set aside twice: neither marker decides alone
    (-1, "we [expected] a superb room , and it was [poor] ."),
    (1, 'the film " the terrible garden " was [brilliant] .'),
    (-1, "the waiter , [who] had a lovely voice , was [not] [good] ."),
    (1, "we did not stay long , and the view was [lovely] ."),
    (-1, "the view was [bad] and nobody was in a hurry ."),
    (1, "it was bad ; it was poor but the bed was good , the pool was good and the view was good ."),
    (-1, "it was [bad] ; it was poor but we left ."),  # a contrast does not reach beyond its own sentence
    (0, "the soup was [good] and the waiter was [bad] ."),
    (0, "the soup was typical ."),
    (0, "the soup was good [but] we left early ."),
    (0, ""),
]


@pytest.mark.parametrize(("polarity", "marked"), SENTENCES)
def test_reading_of_sentences_written_by_hand(polarity, marked):
    words = [word.strip("[]") for word in marked.split()]
    assert evaluate(words) == polarity
    assert evidence(words) == [int(word.startswith("[")) for word in marked.split()]


def test_splits_have_the_sizes_asked_and_rows_are_numbered(corpus):
    assert {split: len(examples) for split, examples in corpus.items()} == DEFAULT_SIZES
    for examples in corpus.values():
        assert [example.sample_id for example in examples] == list(range(len(examples)))


def test_no_sentence_occurs_twice(rows):
    assert len({tuple(example.text) for example in rows}) == len(rows)


@pytest.mark.parametrize("size", [0, 1, 7, 100])
def test_labels_are_balanced(size):
    labels = [example.label for example in generate({"train": size})["train"]]
    assert abs(labels.count(0) - labels.count(1)) <= 1
    assert set(labels) <= {0, 1}
    assert LABELS == ("negative", "positive")


def test_labels_follow_the_evaluator(rows):
    assert all(evaluate(example.text) == (-1, 1)[example.label] for example in rows)


def test_evidence_is_what_a_brute_force_finds_and_never_empty(rows):
    for example in rows[::3]:
        words = example.text
        changes = []
        for position, word in enumerate(words):
            replaced = [*words[:position], NEUTRAL.get(word, word), *words[position + 1 :]]
            changes.append(int(evaluate(replaced) != evaluate(words)))
        assert example.rationale == changes
    assert all(sum(example.rationale) >= 1 for example in rows)


def test_form_of_the_sentences(rows):
    for example in rows:
        assert 8 <= len(example.text) <= 22
        assert example.text[-1] == "."
        assert all(word and word == word.lower() and " " not in word for word in example.text)


def test_replacements_are_words_of_the_corpus_without_a_replacement(rows):
    vocabulary = {word for example in rows for word in example.text}
    assert set(NEUTRAL.values()) <= vocabulary
    assert not set(NEUTRAL) & set(NEUTRAL.values())


def test_sentiment_and_negators_stand_on_both_sides(rows):
    pairs = {pair for example in rows for pair in zip(example.text, example.rationale, strict=True)}
    evident, idle = ({word for word, mark in pairs if mark == side} for side in (1, 0))
    drawn = {word for word in NEUTRAL if word in evident | idle}
    assert drawn - evident == {"because"}  # opens neutral clauses only
    assert drawn <= idle
    words_by_label = [{word for e in rows if e.label == label for word in e.text} for label in (0, 1)]
    assert words_by_label[0] == words_by_label[1]


def test_same_seed_same_corpus_whatever_the_global_generator():
    sizes = {"train": 50, "test": 20}
    random.seed(1)
    first = generate(sizes, seed=3)
    random.seed(2)
    state = random.getstate()
    assert generate(sizes, seed=3) == first
    assert random.getstate() == state
    assert generate(sizes, seed=4) != first


def test_corpus_does_not_depend_on_the_hash_seed():
    code = "from calig.datamodules.controlled import generate; print(generate({'train': 60, 'test': 30}, seed=5))"
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert printed[0] == printed[1] == f"{generate({'train': 60, 'test': 30}, seed=5)}\n"


def test_a_bag_of_words_does_not_solve_it(corpus):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    counts = text.CountVectorizer(analyzer=lambda words: words)
    train, test = ([example.text for example in corpus[split]] for split in ("train", "test"))
    model = linear.LogisticRegression(max_iter=2000)
    model.fit(counts.fit_transform(train), [example.label for example in corpus["train"]])
    assert model.score(counts.transform(test), [example.label for example in corpus["test"]]) <= 0.75


def test_a_corpus_is_drawn_quickly():
    start = time.process_time()
    generate({"train": 4000})
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize("size", [-1, 2.5, "10", True, None])
def test_a_size_that_is_no_count_is_named(size):
    with pytest.raises(InputError, match=r"split 'val' is .* expected a whole number of 0 or more"):
        generate({"train": 10, "val": size})


def test_more_sentences_than_can_be_drawn():
    with pytest.raises(InputError, match="1000001 different sentences, expected 1000000 at most"):
        generate({"train": 1_000_000, "test": 1})


def test_a_grammar_that_runs_dry_says_so(monkeypatch):
    def always_the_same(rng, polarity):
        return ["on", "this", "day", "the", "soup", "was", "good" if polarity > 0 else "bad", "."]

    monkeypatch.setattr(controlled, "_sentence", always_the_same)
    assert len(generate({"train": 2})["train"]) == 2
    with pytest.raises(InputError, match="too few for the sizes asked"):
        generate({"train": 4})


@pytest.mark.parametrize("function", [evaluate, evidence])
def test_malformed_words_are_refused(function):
    with pytest.raises(InputError, match=r"is the string 'a good soup'.*words.split\(\)"):
        function("a good soup")
    with pytest.raises(InputError, match="quotation mark without a partner"):
        function(["the", '"', "good", "soup"])


def test_worked_examples_of_the_docstrings():
    import doctest

    from calig.datamodules import controlled_grammar

    assert doctest.testmod(controlled_grammar).failed == 0
    lines = controlled.__doc__.splitlines()
    worked = [(line, lines[i + 1]) for i, line in enumerate(lines) if line.endswith(("positive", "negative"))]
    assert len(worked) == 3
    for line, marks in worked:
        *words, label = line.split()
        assert LABELS[evaluate(words) > 0] == label
        evident = [word for word, mark in zip(words, evidence(words), strict=True) if mark]
        assert evident == marks.replace("[", " ").replace("]", " ").split()
