"""Archives and folders of class folders: read in place, in the order of paths, and nothing outside."""

import io
import tarfile
import zipfile

import pytest
from test_data_sources import settings

from calig.datamodules.readers import read_local
from calig.datamodules.sources import load_corpus
from calig.pipeline.errors import InputError

SPLIT = {
    "aset/train/pos/2": "good",
    "aset/train/neg/1": "bad",
    "aset/test/pos/1": "fine",
    "aset/test/.DS_Store": "x",
    "aset/README": "not a text",
}
PLAIN = {"pos/b.txt": "good", "pos/a.txt": "fine", "neg/a.txt": "bad"}


def pack(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for name, text in files.items():
                data = text if isinstance(text, bytes) else text.encode()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(path)


def unpack(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def content(splits):
    return {split: list(zip(rows.values("text"), rows.values("label"), strict=True)) for split, rows in splits.items()}


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar", "x.zip"])
def test_archive_with_split_folders(tmp_path, name):
    path = pack(tmp_path / name, SPLIT)
    splits = read_local(path)
    assert content(splits) == {"train": [("bad", "neg"), ("good", "pos")], "test": [("fine", "pos")]}
    assert splits["train"].place(0) == f"aset/train/neg/1 in {path}"
    assert splits["train"].notes == [f"1 files of {path} outside its class folders left out (aset/README)"]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_without_split_folders_the_rows_are_cut_and_the_order_is_that_of_the_paths(tmp_path):
    expected = [("bad", "neg"), ("fine", "pos"), ("good", "pos")]
    assert content(read_local(pack(tmp_path / "x.tar.gz", PLAIN))) == {"all": expected}
    assert content(read_local(pack(tmp_path / "x.zip", dict(reversed(PLAIN.items()))))) == {"all": expected}
    assert content(read_local(unpack(tmp_path / "folder", PLAIN))) == {"all": expected}
    many = {f"{label}/{i}": f"{label} {i}" for label in ("a", "b") for i in range(10)}
    corpus = load_corpus(settings(path=pack(tmp_path / "many.tgz", many)), seed=0)
    assert corpus.label_names == ["a", "b"] and [len(rows) for rows in corpus.splits.values()] == [10, 4, 6]


def test_an_archive_per_split_and_folders(tmp_path):
    for split in ("train", "test"):
        pack(
            tmp_path / f"news-bydate-{split}.tar.gz", {f"data/news-bydate-{split}/{c}/1": f"{split} {c}" for c in "ab"}
        )
    assert content(read_local(str(tmp_path))) == {
        "train": [("train a", "a"), ("train b", "b")],
        "test": [("test a", "a"), ("test b", "b")],
    }
    pack(tmp_path / "dev.zip", {"test/a/1": "x"})
    with pytest.raises(InputError, match=r"dev.zip holds the splits test, but its name says val"):
        read_local(str(tmp_path))
    folder = unpack(tmp_path / "folder", {name.removeprefix("aset/"): text for name, text in SPLIT.items()})
    assert content(read_local(folder)) == {"train": [("bad", "neg"), ("good", "pos")], "test": [("fine", "pos")]}


@pytest.mark.parametrize("member", ["../a/1", "/a/1", "x/../../a/1"])
@pytest.mark.parametrize("name", ["x.tar.gz", "x.zip"])
def test_members_that_point_outside(tmp_path, name, member):
    with pytest.raises(InputError, match=r"points out of the archive"):
        read_local(pack(tmp_path / name, {"a/2": "fine", member: "x"}))


def test_links_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("a/1", tarfile.SYMTYPE), ("a/2", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            archive.addfile(info)
    with pytest.raises(InputError, match=r"x.tar holds no class folders.*Found: no files"):
        read_local(str(tmp_path / "x.tar"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("a/1")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/hostname")
    with pytest.raises(InputError, match=r"x.zip holds no class folders"):
        read_local(str(tmp_path / "x.zip"))


def test_broken_archives_and_what_is_no_text(tmp_path):
    for name in ("x.tar.gz", "x.zip"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            read_local(str(tmp_path / name))
    whole = pack(tmp_path / "y.tar.gz", {f"a/{i}": str(i) * 2000 for i in range(50)})
    data = (tmp_path / "y.tar.gz").read_bytes()
    (tmp_path / "y.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"y.tar.gz cannot be read"):
        read_local(whole)
    with pytest.raises(InputError, match=r"a/1 in .*z.tgz is not UTF-8: byte 0xe9 in line 2"):
        read_local(pack(tmp_path / "z.tgz", {"a/1": b"one\ncaf\xe9", "b/1": b"x"}))
    with pytest.raises(InputError, match=r"holds images \(a/1.png\)"):
        read_local(pack(tmp_path / "z.tgz", {"a/1.png": b"\x89PNG"}))
    with pytest.raises(InputError, match=r"a/1 in .*z.tgz: the text .* is missing or empty"):
        load_corpus(settings(path=pack(tmp_path / "z.tgz", {"a/1": "", "b/1": "x"})), seed=0)
    unpack(tmp_path / "sets", {"one/train.csv": "text,label\na,1\n"})
    with pytest.raises(InputError, match=r"no train, val or test file"):
        read_local(str(tmp_path / "sets"))
