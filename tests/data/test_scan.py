"""The steps of a preparation on their own: parts that are scanned, duplicates over all of them, shards and samples."""

import json
import random

import pytest

from dsv3.data import SourceSettings, embedded_corpus, heldout_place, mixture_settings, read_sources
from dsv3.data.duplicates import drop_duplicates
from dsv3.data.encode import kept_documents, plan_shards, sample_texts
from dsv3.data.scan import ScanTask, scan_part, source_parts
from dsv3.data.settings import check_sources, make_source
from dsv3.data.work import read_index, read_keep, read_names, read_scan, read_texts, remove_unfinished, scan_folder

OPTIONS = {"heldout": 0.3, "seed": 0, "permutations": 64, "shingle": 5, "unit": "words", "bad_rows": "raise"}


def text(rng, words=40):
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(words))


def changed(sentence):
    """The same but for one word in the middle: similarity about 0.76 of runs of five."""
    words = sentence.split()
    words[len(words) // 2] = "other"
    return " ".join(words)


def scan(tmp_path, name, texts, part_bytes=10**9, **settings):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = make_source("test", {"name": name, "path": str(file), "filters": "none", **settings})
    parts = source_parts(source, part_bytes)
    for number, part in enumerate(parts):
        scan_part(ScanTask(source=source, number=number, part=part, work=str(tmp_path / "work"), **OPTIONS))
    return len(parts)


def test_documents_are_stored_by_split_in_order(tmp_path):
    rng = random.Random(0)
    texts = [text(rng) for _ in range(40)]
    scan(tmp_path, "a", [*texts, "\1\2"])
    index = read_index(tmp_path / "work", "a", 0, signatures=True)
    held = [heldout_place(t) < 0.3 for t in texts]
    assert index.heldout.tolist() == held and index.sizes.tolist() == [len(t) for t in texts]
    assert index.signatures.shape == (40, 64) and index.keys.shape == (40, 16) and len(set(index.hashes.tolist())) == 40
    for split, side in (("train", False), ("heldout", True)):
        assert list(read_texts(tmp_path / "work", "a", 0, split)) == [t for t, h in zip(texts, held) if h == side]
    found = read_scan(tmp_path / "work", "a", 0)
    assert found["read"][0] == 41 and found["dropped"]["is empty"]["documents"] == 1
    assert found["stored"]["train"][0] + found["stored"]["heldout"][0] == 40
    assert found["clock"]["scan"]["seconds"] >= found["clock"]["sign"]["seconds"] > 0


def test_a_part_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="line 3: `text` is a int"):
        scan(tmp_path, "a", ["one", "two", 3])
    assert list((tmp_path / "work" / "scan" / "a").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_damaged_texts_are_an_error_that_names_the_file(tmp_path, damage):
    """A stream of zstd that is cut off ends without an error of its own."""
    rng = random.Random(4)
    scan(tmp_path, "a", [text(rng) for _ in range(60)])
    file = scan_folder(tmp_path / "work", "a", 0) / "train.zst"
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": data[:6] + bytes(200) + data[206:]}[damage])
    with pytest.raises(OSError, match=rf"^read_texts: '{file}' is damaged, want its folder deleted"):
        list(read_texts(tmp_path / "work", "a", 0, "train"))


def test_what_was_left_half_written_is_removed(tmp_path):
    scan(tmp_path, "a", ["one"])
    (tmp_path / "work" / "scan" / "a" / ".00001.77").mkdir()
    (tmp_path / "work" / "scan" / "a" / ".00001.77" / "train.zst").write_text("half")
    (tmp_path / "work" / ".inputs.json.part").write_text("half")
    remove_unfinished(tmp_path / "work")
    left = sorted(path.name for path in (tmp_path / "work").rglob("*"))
    assert left == ["00000", "a", "heldout.zst", "index.npz", "names.json", "part.json", "scan", "train.zst"]
    assert scan_folder(tmp_path / "work", "a", 0).is_dir()


def test_near_copies_do_not_stay_on_the_other_side(tmp_path):
    """Of each pair, one held out and one not, in two sources, the first stays, whichever side it is on."""
    rng, pairs = random.Random(1), []
    while len(pairs) < 12:
        one = text(rng, 80)
        two = changed(one)
        if (heldout_place(one) < 0.3) != (heldout_place(two) < 0.3):
            pairs.append((one, two))
    counts = {"a": scan(tmp_path, "a", [one for one, _ in pairs], 2000), "b": scan(tmp_path, "b", [two for _, two in pairs])}
    found = drop_duplicates(tmp_path / "work", counts, threshold=0.7)
    assert found["dropped"]["b"]["near"][0] == found["crossing"] == found["groups"] == 12 and found["documents"] == 24
    assert found["dropped"]["a"] == {} and found["largest"] == [2] * 10 and len(found["examples"]) == 12
    for example, (one, two) in zip(found["examples"], pairs):
        assert (example["kept"]["text"], example["dropped"]["text"]) == (one[:160], two[:160])
        assert example["kept"]["split"] != example["dropped"]["split"] and example["similarity"] >= 0.7
    assert all(read_keep(tmp_path / "work", "a", i).all() for i in range(counts["a"]))
    assert not read_keep(tmp_path / "work", "b", 0).any()
    assert plan_shards(tmp_path / "work", "train", "b", 1, 1) == plan_shards(tmp_path / "work", "heldout", "b", 1, 1) == []


def test_shards_take_parts_until_they_are_full(tmp_path):
    rng = random.Random(2)
    texts = [text(rng) for _ in range(60)]
    count = scan(tmp_path, "a", texts, 1500)
    drop_duplicates(tmp_path / "work", {"a": count}, threshold=0.8)
    for split in ("train", "heldout"):
        wanted = [t for t in texts if (heldout_place(t) < 0.3) == (split == "heldout")]
        for shard_bytes in (1, 3000, 10**9):
            shards = plan_shards(tmp_path / "work", split, "a", count, shard_bytes)
            found = [[t for t, _, _ in kept_documents(tmp_path / "work", "a", parts, split)] for parts, _ in shards]
            assert [t for shard in found for t in shard] == wanted
            assert [sum(len(t) for t in shard) for shard in found] == [size for _, size in shards]
            assert all(size >= shard_bytes for _, size in shards[:-1])
            for parts, _ in shards:
                assert sum(n for _, n, _ in kept_documents(tmp_path / "work", "a", parts[:-1], split)) < shard_bytes
        assert len(shards) == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 2.0])
def test_samples_have_of_each_source_its_share(tmp_path, share):
    rng = random.Random(3)
    counts = {name: scan(tmp_path, name, [text(rng) for _ in range(n)], 2000) for name, n in (("a", 120), ("b", 60))}
    drop_duplicates(tmp_path / "work", counts, threshold=0.8)
    kept = {n: [t for t, _, _ in kept_documents(tmp_path / "work", n, tuple(range(c)), "train")] for n, c in counts.items()}
    sizes = {name: sum(map(len, texts)) for name, texts in kept.items()}
    sample = list(sample_texts(tmp_path / "work", counts, sizes, round(share * sum(sizes.values()))))
    assert sample == [t for texts in kept.values() for t in texts if t in set(sample)]
    for texts in kept.values():
        taken = sum(len(t) for t in texts if t in set(sample))
        longest = max(map(len, texts))
        assert abs(taken - min(1.0, share) * sum(map(len, texts))) <= longest
    if share < 1:  # from the whole length of a source
        assert max(kept["a"].index(t) for t in sample if t in kept["a"]) > 0.8 * len(kept["a"])


def test_embedded_corpus_in_parts(tmp_path):
    source = SourceSettings("reference", "embedded:reference", filters="none")
    parts = source_parts(source, 100_000)
    names = []
    for number, part in enumerate(parts):
        task = ScanTask(source=source, number=number, part=part, work=str(tmp_path), **{**OPTIONS, "permutations": 0})
        scan_part(task)
        names += read_names(tmp_path, "reference", number)
    want = [d for d in embedded_corpus() if d.name.startswith("reference/")]
    assert names == [d.name for d in want] and len(parts) > 3
    assert sum(part.bytes for part in parts) == sum(len(d.text.encode()) for d in want)
    with pytest.raises(ValueError, match="source_parts: no document for 'embedded:poems', want embedded:stdlib"):
        source_parts(SourceSettings("poems", "embedded:poems"), 1)


# Settings


def test_sources_from_a_file(tmp_path):
    rows = {"a": {"path": "texts", "licence": "MIT", "repeats": 2}, "b": {"path": "embedded:stdlib", "kind": "code"}}
    (tmp_path / "sources.json").write_text(json.dumps(rows))
    a, b = read_sources(tmp_path / "sources.json")
    assert (a.path, a.licence, a.kind, a.repeats) == (str(tmp_path / "texts"), "MIT", "prose", 2.0)
    assert (b.path, b.licence, b.kind) == ("embedded:stdlib", "unknown", "code")
    assert mixture_settings((a, b)) == {"weights": None, "repeats": {"a": 2.0}, "epochs": None}
    assert [name for name, _ in a.filter_settings()][:2] == ["word_count", "word_length"]
    with_language = make_source("test", {"name": "a", "path": "x", "languages": "en+de", "filters": "letters"})
    assert with_language.filter_settings()[1] == ("language", {"languages": "en+de", "min_probability": 0.5, "sample": 1000})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "a"}, "test: source 'a' has no `path`"),
        ({"name": "a", "path": 3}, "test: source 'a' has no `path`"),
        ({"name": "..", "path": "x"}, "test: source '..': want a name of letters, digits, _ . - for its folder"),
        ({"name": "a", "path": "x", "chunk": 0}, "test: source 'a': `chunk` is 0, want at least 1"),
        ({"name": "a", "path": "x", "chunk": 1.5}, "test: source 'a': `chunk` is 1.5, want a number of type int"),
        ({"name": "a", "path": "x", "weight": -1}, "test: source 'a': `weight` is -1.0, want a number of at least 0"),
        ({"name": "a", "path": "x", "epochs": 0}, "test: source 'a': `epochs` is 0.0, want a number above 0"),
        ({"name": "a", "path": "x", "repeats": "nan"}, "test: source 'a': `repeats` is nan, want a number of at least 0"),
        ({"name": "a", "path": "x", "licence": 1}, "test: source 'a': `licence` is a int, want a string"),
        ({"name": "a", "path": "x", "filters": "good"}, "test: source 'a': parse_filters: `text` has 'good'"),
    ],
)
def test_wrong_fields_are_named(values, message):
    with pytest.raises(ValueError) as caught:
        make_source("test", values)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "fields, message",
    [
        ([], "check_sources: `sources` is empty"),
        ([{"weight": 0.0}, {"weight": 0.0}], "mixture_settings: the weights sum to zero, want one above it"),
        ([{"repeats": 0.0}, {"repeats": 0.0}], "mixture_settings: the repeats sum to zero, want one above it"),
        ([{"weight": 1.0}, {"repeats": 1.0}], "mixture_settings: sources have weights and repeats, want one of them"),
        ([{"weight": 1.0}, {}], "mixture_settings: source ['s1'] has no weight, want one for each; 0 leaves it out"),
    ],
)
def test_sources_that_make_no_mixture_are_refused(fields, message):
    with pytest.raises(ValueError) as caught:
        check_sources(SourceSettings(f"s{i}", "x", **values) for i, values in enumerate(fields))
    assert str(caught.value).startswith(message)
