"""Files to rows, and rows to texts and rationales: every format, and what is wrong with a file by name and row."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_sources import columns, settings

from calig.datamodules.columns import label_column, read_texts, text_column
from calig.datamodules.readers import read_file, read_local
from calig.datamodules.sources import load_corpus
from calig.pipeline.errors import InputError

TABLE = {"text": ["1.0", "2020-01-01", 'he said "no", twice'], "label": ["1", "0", "1"]}
RECORDS = [dict(zip(TABLE, row, strict=True)) for row in zip(*TABLE.values(), strict=True)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def plain(rows):
    return {name: rows.values(name) for name in rows.columns}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", '\ufefftext,label\n1.0,1\n2020-01-01,0\n"he said ""no"", twice",1\n'),
        ("x.tsv", 'text\tlabel\r\n1.0\t1\r\n2020-01-01\t0\r\nhe said "no", twice\t1'),
        ("x.json", json.dumps(RECORDS)),
        ("x.json", "\n".join(map(json.dumps, RECORDS))),
        ("x.JSONL", "\n\n".join(map(json.dumps, RECORDS)) + "\n"),
    ],
)
def test_text_formats_keep_strings_as_they_are(tmp_path, name, content):
    assert plain(read_file(write(tmp_path / name, content))) == TABLE


def test_parquet_and_its_types(tmp_path):
    pq.write_table(pa.table({"tokens": [["a", "b"]], "label": [1]}), tmp_path / "x.parquet")
    assert plain(read_file(tmp_path / "x.parquet")) == {"tokens": [["a", "b"]], "label": [1]}
    write(tmp_path / "broken.parquet", "no parquet")
    with pytest.raises(InputError, match=r"broken.parquet cannot be read"):
        read_file(tmp_path / "broken.parquet")


def test_header_less_files_name_columns_by_index(tmp_path):
    rows = read_file(write(tmp_path / "x.tsv", 'a "quote\t1\nb\t0\n'), header=False)
    assert plain(rows) == {"0": ['a "quote', "b"], "1": ["1", "0"]}
    with pytest.raises(InputError, match=r"no text column of a known name.*data.columns.text; columns: 0, 1"):
        text_column(rows, None)


def test_quoted_field_may_hold_line_breaks_and_long_texts(tmp_path):
    long = "word " * 500_000
    rows = read_file(write(tmp_path / "x.csv", f'text,label\n"two\nlines",1\n{long},0\n'))
    assert rows.values("text") == ["two\nlines", long]


def test_folder_of_splits(tmp_path):
    for name in ("train.csv", "dev.jsonl", "test.csv"):
        write(tmp_path / name, "text,label\na,1\n" if name.endswith("csv") else '{"text": "b", "label": 1}')
    write(tmp_path / "SOURCE.md", "not data")
    splits = read_local(str(tmp_path))
    assert {split: rows.values("text") for split, rows in splits.items()} == {
        "train": ["a"],
        "val": ["b"],
        "test": ["a"],
    }
    write(tmp_path / "valid.csv", "text,label\na,1\n")
    with pytest.raises(InputError, match=r"2 files for the val split: dev.jsonl, valid.csv"):
        read_local(str(tmp_path))
    (tmp_path / "train.csv").unlink()
    (tmp_path / "valid.csv").unlink()
    assert list(read_local(str(tmp_path))) == ["val", "test"]
    with pytest.raises(InputError, match=r"no training file.*Found: SOURCE.md, dev.jsonl, test.csv"):
        load_corpus(settings(path=str(tmp_path)), seed=0)
    (tmp_path / "dev.jsonl").unlink()
    (tmp_path / "test.csv").unlink()
    with pytest.raises(InputError, match=r"no train, val or test file.*Found: SOURCE.md"):
        read_local(str(tmp_path))


def test_names_that_end_with_the_split_and_parts_of_one_split(tmp_path):
    for name, text in (("a-train-00001-of-00002", "b"), ("a-train-00000-of-00002", "a"), ("a_b.dev", "c")):
        pq.write_table(pa.table({"text": [text], "label": [1]}), tmp_path / f"{name}.parquet")
    write(tmp_path / "dev.csv", "text,label\nexact,1\n")
    splits = read_local(str(tmp_path))
    assert splits["train"].values("text") == ["a", "b"] and splits["val"].values("text") == ["exact"]
    (tmp_path / "a-train-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"1 of the 2 parts of the train split"):
        read_local(str(tmp_path))


CONLLU = """# newdoc id = 7
# sentiment = good
# text = Don't stop
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\t_\t_\t_\t0\t_\t_\t_
2\tn't\tnot\t_\t_\t_\t1\t_\t_\t_
3\tstop\tstop\t_\t_\t_\t1\t_\t_\t_
3.1\tnow\tnow\t_\t_\t_\t_\t_\t_\t_

# sentiment = bad
1\tNo\tno\t_\t_\t_\t0\t_\t_\t_"""


def test_conllu(tmp_path):
    rows = read_file(write(tmp_path / "x.conllu", CONLLU))
    assert read_texts(rows, columns()).texts == [["Do", "n't", "stop"], ["No"]]
    assert rows.values(label_column(rows, None)) == ["good", "bad"] and rows.values("newdoc id") == ["7", None]
    with pytest.raises(InputError, match=r"x.conllu, line 2, has 2 columns; conllu has 10"):
        read_file(write(tmp_path / "x.conllu", "# a = b\n1\tword\n"))


def test_arrow_files_and_the_class_names_in_them(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "x.parquet")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (arrow, tmp_path / "x.parquet"):
        assert plain(read_file(path)) == {"text": ["a", "b", "c"], "label": ["yes", "no", None]}
    table = pa.table({"text": ["a"]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert plain(read_file(tmp_path / "x.arrow")) == {"text": ["a"]}
    with pytest.raises(InputError, match=r"y.arrow cannot be read"):
        read_file(write(tmp_path / "y.arrow", "no arrow"))


def test_folders_of_save_to_disk(tmp_path):
    made = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]})
    made.select([2, 0]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made, validation=made.select([1]), extra=made).save_to_disk(tmp_path / "dict")
    assert {split: rows.values("text") for split, rows in read_local(str(tmp_path / "one")).items()} == {
        "all": ["c", "a"]
    }
    splits = read_local(str(tmp_path / "dict"))
    assert {split: rows.values("text") for split, rows in splits.items()} == {"train": ["a", "b", "c"], "val": ["b"]}
    assert "left out: extra" in splits["train"].notes[0]
    (tmp_path / "dict" / "train" / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"looks like a folder of save_to_disk and cannot be read"):
        read_local(str(tmp_path / "dict"))


def test_word_lists_in_csv(tmp_path):
    rows = read_file(write(tmp_path / "x.csv", 'text,label\n"[""a"", ""b""]",1\n"[""c""]",0\n'))
    assert read_texts(rows, columns()).texts == [["a", "b"], ["c"]]
    rows = read_file(write(tmp_path / "x.csv", 'text,label\n"[""a"", ""b""]",1\n["sic],0\n'))
    assert read_texts(rows, columns()).texts[0] == '["a", "b"]'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", "x.csv is empty"),
        ("x.jsonl", "\n \n", "x.jsonl is empty"),
        ("x.csv", b"text,label\ncaf\xe9,1\n", "x.csv is not UTF-8: byte 0xe9 in line 2"),
        ("x.csv", "text,label\na,1\nb,c,0\n", r"x.csv is ragged: row 2 has 3 columns, expected 2: 'b,c,0'"),
        ("x.csv", 'text,label\na,1\n"open,0\n', r"x.csv is ragged: row 2"),
        ("x.csv", "text,text\na,1\n", "x.csv has more than one column 'text'"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "x.jsonl, line 2, is not valid JSON"),
        ("x.jsonl", '{"text": "a", "text": "b"}', "x.jsonl has more than one column 'text'"),
        ("x.parquet", "", "x.parquet is empty"),
        ("x.json", "[1, 2]", r"row 1 of .*x.json is not a JSON object"),
        ("x.txt", "text", r"unknown file type '.txt'.*Options: .csv"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read_file(write(tmp_path / name, content))


def test_missing_file_suggests_a_neighbour(tmp_path):
    write(tmp_path / "reviews.csv", "text,label\na,1\n")
    with pytest.raises(InputError, match=r"unknown file '.*review.csv'.*Options: reviews.csv"):
        read_local(str(tmp_path / "review.csv"))
    with pytest.raises(InputError, match=r"unknown file"):
        read_local(str(tmp_path / "no" / "such" / "folder"))


def test_columns_are_found_by_name_or_as_named(tmp_path):
    rows = read_file(write(tmp_path / "reviews.csv", "id,Review,Sentiment,other\n7,a text,1,b text\n"))
    assert (text_column(rows, None), label_column(rows, None)) == ("Review", "Sentiment")
    assert read_texts(rows, columns(text="other", text_pair="Review"))[:2] == (["b text"], ["a text"])
    with pytest.raises(
        InputError, match=r"unknown column 'othr'. Did you mean 'other'\? Options: id, Review.*reviews.csv"
    ):
        text_column(rows, "othr")
    with pytest.raises(InputError, match=r"data.columns.label, looked for in .*reviews.csv"):
        label_column(rows, "y")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": " "}, "row 2 of .*missing or empty"),
        ({"text": None}, "row 2 of .*missing or empty"),
        ({"text": []}, "row 2 of .*missing or empty"),
        ({"text": 3}, "row 2 of .*holds '3' of type int"),
        ({"text": ["a", 3]}, "row 2 of .*type list"),
        ({"text": "half \ud83d"}, "row 2 of .*half a character"),
    ],
)
def test_bad_text_names_the_row(tmp_path, record, message):
    rows = read_file(write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, [{"text": "fine"}, record]))))
    with pytest.raises(InputError, match=message):
        read_texts(rows, columns())


@pytest.mark.parametrize("marks", [[0, 1, 0], [False, True, False], [0.0, 1.0, 0.0], "[0, 1, 0]", "0 1 0"])
@pytest.mark.parametrize("text", ["a good film", ["a", "good", "film"]])
def test_rationales_in_every_form(tmp_path, text, marks):
    records = [{"text": text, "rationale": marks}, {"text": "two words", "rationale": None}]
    rows = read_file(write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, records))))
    texts, _, rationales, _ = read_texts(rows, columns())
    assert texts == [["a", "good", "film"], ["two", "words"]]
    assert rationales == [[0, 1, 0], None]


def test_rationale_from_csv_where_empty_is_unknown(tmp_path):
    rows = read_file(write(tmp_path / "x.csv", 'text,label,rationale\na b,1,0 1\nc,0,\nd e,1,"[1, 1]"\n'))
    assert read_texts(rows, columns())[2] == [[0, 1], None, [1, 1]]


def test_rationale_that_does_not_fit(tmp_path):
    def read(marks, named=None):
        rows = read_file(write(tmp_path / "x.jsonl", json.dumps({"text": "a good film", "rationale": marks})))
        return read_texts(rows, columns(rationale=named))

    with pytest.raises(InputError, match=r"row 1 of .*rationale has 2 entries, the text 3 words"):
        read([0, 1])
    with pytest.raises(InputError, match=r"row 1 of .*not a rationale"):
        read([0, 1, 2], named="rationale")
    # Free text that happens to be called so is left alone, unless it was asked for.
    assert read("because it is good")[0] == ["a good film"]
    with pytest.raises(InputError, match=r"not a rationale"):
        read("because it is good", named="rationale")
