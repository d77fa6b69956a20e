import pytest

from tvq.data import splits


def test_the_split_of_a_name_never_changes():
    # Recorded: another hash would move text from training to test.
    names = ["os.py", "json/decoder.py", "a4.txt", "a122.txt", "a14.txt", "a189.txt"]
    wanted = ["train", "train", "validation", "validation", "test", "test"]
    assert [splits.hashed_split(name) for name in names] == wanted


def test_split_shares():
    told = [splits.hashed_split(f"{i}.txt") for i in range(20_000)]
    assert told.count("train") / 20_000 == pytest.approx(0.98, abs=0.004)
    assert told.count("validation") / 20_000 == pytest.approx(0.01, abs=0.003)
    assert told.count("test") / 20_000 == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train.jsonl data/train-00000-of-00002.parquet train/1.txt train_64x64/1.png Train.txt"),
        (
            "train",
            "train_data_batch_9.npz training.txt wiki.train.tokens books_train_03.jsonl.zst train1.jsonl",
        ),
        ("validation", "validation/a.txt valid.jsonl val_data.npz dev.txt wiki.valid.raw x-dev-0.jsonl.gz"),
        ("test", "test.jsonl en/test-00001-of-00001.jsonl eval.jsonl evaluation/1.txt test/train.txt"),
        (
            "",
            "values.jsonl testimonials.jsonl trains/1.txt README.md value.txt contest.txt trainer/1",
        ),
        ("", "tests/a.txt a.tests latest.txt evaluations.jsonl valley/val1ey.txt the-test-of-time.txt"),
    ],
)
def test_names_that_tell_a_split(split, names):
    for name in names.split():
        assert splits.named_split(name) == split, name


TRIPLE = ["train-0.jsonl", "validation-0.jsonl", "test-0.jsonl"]


@pytest.mark.parametrize(
    ("names", "choice", "wanted"),
    [
        (TRIPLE, "", ["train", "validation", "test"]),
        ([*TRIPLE, "README.md", "LICENSE", "dataset_infos.json"], "", ["train", "validation", "test"]),
        ([*TRIPLE, "extra.jsonl"], "", ["train", "validation", "test"]),
        (["train.txt", "test.txt", "README.md", "a.csv", "b.csv"], "", ["train", "test"]),
        (TRIPLE, "hash", []),
        (["train-0.jsonl", "train-1.jsonl", "README.md"], "", []),  # all of it trains: cut by the hash
        (["values.jsonl", "testimonials.jsonl", "trains/a.jsonl"], "", []),
        (["train.py", "test_a.py", *"abc"], "names", ["train", "test"]),
    ],
)
def test_published_splits(names, choice, wanted):
    assert list(splits.told_splits(names, choice).values()) == wanted


@pytest.mark.parametrize(
    ("names", "choice", "wanted"),
    [
        (["train.py", "test_a.py", "a.py", "b.py"], "", "and 2 others tell none, such as a.py; name all"),
        (
            ["corpus.jsonl", "test.jsonl"],
            "",
            r"such as test.jsonl \(test\), and 1 others tell none, such as corpus.jsonl",
        ),
        (["validation.jsonl", "test.jsonl"], "", "and none of them trains; .* --split=hash"),
        (["a.txt"], "names", "no name tells a split"),
    ],
)
def test_what_cannot_be_told_is_refused(names, choice, wanted):
    with pytest.raises(ValueError, match=wanted):
        splits.told_splits(names, choice)
