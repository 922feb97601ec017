"""Class names: sorting, lookup, and matching the classes of data with those of a model."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
import torch

from hasten.errors import BadInput
from hasten.train.data import Data
from hasten.train.names import class_index, index_map, label_indices, match_labels, natural_key, split_labels


def test_the_order_is_total_and_numeric() -> None:
    names = ["10", "9", "2", "02", "1", "01", "①", "②", "²", "a10", "a9", "a", "", "9" * 5000, "b"]
    expected = sorted(names, key=natural_key)
    for seed in range(20):
        random.Random(seed).shuffle(names)
        assert sorted(names, key=natural_key) == expected
    assert [n for n in expected if n in ("01", "1", "02", "2", "9", "10")] == ["01", "1", "02", "2", "9", "10"]
    assert expected.index("a9") < expected.index("a10")


CASES = [
    (("1", "2", "3"), 1, 0), (("1", "2", "3"), "1", 0), (("1", "2", "3"), "3", 2), (("1", "2", "3"), np.int64(2), 1),
    (("1", "01"), "01", 1), (("1", "01"), 1, 0), (("1", "2"), "02", 1),
    (("cat", "dog"), 1, 1), (("cat", "dog"), "1", 1), (("cat", "dog"), " DOG ", 1), (("cat", "dog"), "none", 9),
    (("Cat", "cat"), "cat", 1), (("Cat", "cat"), "Cat", 0), (("none", "some"), "none", 0),
    ((unicodedata.normalize("NFC", "café"), "tea"), unicodedata.normalize("NFD", "café"), 0),
]  # fmt: skip


@pytest.mark.parametrize(("classes", "label", "index"), CASES)
def test_names_take_precedence_over_indices(classes: tuple[str, ...], label: object, index: int) -> None:
    assert class_index(label, classes, 9, "m") == index


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (("1", "2", "3"), 0, "unknown label 0 for m: choices: 1, 2, 3"),  # index 0 would be the class "1"
        (("cat", "dog"), 2, "unknown label 2 for m: choices: 0 cat, 1 dog"),
        (("cat", "dog"), "cot", "did you mean 'cat'"),
        (("cat", "dog"), True, "unknown label True"),
        (("cat", "dog"), 1.0, "unknown label 1.0"),
        (("Cat", "cAt"), "cat", "could be Cat or cAt"),
    ],
)
def test_ambiguous_labels_raise(classes: tuple[str, ...], label: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        class_index(label, classes, None, "m")


def test_tensors_are_indices_and_lists_are_names() -> None:
    def indices(label: object, n: int = 4) -> list[int]:
        return label_indices(n, label, ("1", "2", "3"), 3, "m").tolist()

    assert indices(None) == [0, 1, 2, 0]
    assert indices(["1", 3]) == [0, 2, 0, 2]
    assert indices(torch.tensor([1, 2, 3])) == [1, 2, 3, 1]
    assert indices(np.array([1, 2])) == [1, 2, 1, 2]
    assert indices(torch.tensor(2)) == [2] * 4
    assert indices(one for one in ("2", "none")) == [1, 3, 1, 3]
    for wrong in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.0]), torch.zeros(2, 2, dtype=torch.long), []):
        with pytest.raises(BadInput):
            indices(wrong)


def test_a_list_may_hold_names_with_commas() -> None:
    classes = ("cat, small", "cat", "dog", "a, b, c")
    assert split_labels("cat, small", classes) == "cat, small"
    assert split_labels("dog,CAT, small,cat,a, b, c", classes) == ["dog", "CAT, small", "cat", "a, b, c"]
    assert split_labels("0, 1", classes) == ["0", "1"]
    assert split_labels("dog", classes) == "dog"


def test_classes_of_data_are_matched_by_name() -> None:
    assert index_map(("a", "B", "c"), ("C", "b", "a"), "d", "m") == [2, 1, 0]
    assert index_map(("b",), ("a", "b"), "d", "m") == [1]
    assert index_map(("0", "1"), ("cat", "dog"), "d", "m") == [0, 1]
    assert index_map(("01", "2"), ("1", "2", "3"), "d", "m") == [0, 1]
    for names, classes in ((("x", "y"), ("a", "b")), (("0", "2"), ("a", "b")), (("a", "b"), ("0", "1")),
                           (("0", "1"), ("1", "2")), (("0", "a"), ("a", "b")), (("a", "A"), ("a", "b"))):  # fmt: skip
        with pytest.raises(BadInput, match=f"(?s){classes[0]}, {classes[1]}"):
            index_map(names, classes, "d", "m")


def test_matched_data_keep_each_image_with_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1)
    data = Data.of(images, torch.tensor([0, 1, 2, 0]), ("bag", "coat", "shirt"), "somewhere")
    matched = match_labels(data, ("shirt", "coat", "hat", "bag"), "m")
    assert matched.classes == ("shirt", "coat", "hat", "bag")
    assert matched.labels is not None and matched.labels.tolist() == [3, 1, 0, 3]
    assert "no images of 1 of the 4 classes of m: hat" in capsys.readouterr().err
    with pytest.raises(BadInput, match="3 classes, plain has no labels"):
        match_labels(Data.of(images, source="plain"), ("a", "b", "c"), "m")
    assert match_labels(Data.of(images, source="plain"), ("a",), "m", required=False).labels is None
    assert match_labels(data, None, "unconditional").labels is None
    assert "its 3 classes are not used, unconditional has none" in capsys.readouterr().err
