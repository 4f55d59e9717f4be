"""Datasets of other formats: what is read equals what was written, nothing is executed, damage is told in one line."""

import io
import json
import pickle
import pickletools
import tarfile
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from nets.cifar import load_cifar_dataset
from nets.data import Examples, assemble_dataset, make_examples
from nets.data_streams import collect_dataset
from nets.dataset_files import load_dataset
from nets.image_folders import load_image_folder
from nets.personalisation import make_personalisation
from nets.plain_pickle import read_plain_pickle

SPLITS = ("train", "validation", "test")
PER_BATCH = 20


def batch(seed, num=PER_BATCH):
    """Images (n, 32, 32, 3) and labels that hold every class."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, 32, 32, 3), np.uint8), np.arange(num) % 10


def planes(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


class Python2Pickler(pickle._Pickler):
    """Writes text as Python 2 did, as byte strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data):
        small = len(data) < 256
        self.write((b"U" + bytes([len(data)]) if small else b"T" + len(data).to_bytes(4, "little")) + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue()


def cifar_files(version):
    """Content by file name; batches 1 to 5 have seeds 1 to 5, the test batch 0."""
    files = {}
    for seed, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        images, labels = batch(seed)
        if version == "binary":
            files[f"{name}.bin"] = b"".join(
                bytes([label]) + row.tobytes() for label, row in zip(labels, planes(images), strict=True)
            )
        else:
            content = {b"batch_label": b"of 5", b"labels": labels.tolist(), b"data": planes(images)}
            content[b"filenames"] = [b"a.png"] * len(labels)
            files[name] = pickle.dumps(content, 4) if version == "python 3" else python2_pickle(content)
    return files


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("is_archive", [False, True])
@pytest.mark.parametrize("version", ["binary", "python 2", "python 3"])
def test_cifar(tmp_path, version, is_archive):
    files = cifar_files(version)
    path = tmp_path / "cifar.tar.gz" if is_archive else tmp_path
    if is_archive:
        write_archive(path, files)
    for name, data in () if is_archive else files.items():
        (tmp_path / name).write_bytes(data)
    dataset = load_dataset(path)
    images, labels = batch(0)
    np.testing.assert_array_equal(dataset.test.images * np.float32(255), images)
    np.testing.assert_array_equal(dataset.test.labels, labels)
    assert [len(getattr(dataset, split).labels) for split in SPLITS] == [83, 17, PER_BATCH]
    both = np.concatenate([dataset.train.images, dataset.validation.images])
    written = np.concatenate([batch(seed)[0] for seed in range(1, 6)]) / np.float32(255)
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in written)
    assert not list(tmp_path.glob("cifar-10-batches"))


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_is_read_and_not_run(capsys):
    for value in ({b"data": Evil()}, Evil(), [Evil()]):
        with pytest.raises(ValueError, match=r"would call (builtins|__builtin__)\.print"):
            read_plain_pickle(pickle.dumps(value, 2))
    # Nested in each other, tuples double with every level whoever shows, hashes or compares them.
    bomb = b"\x80\x02)" + b"q\x00h\x00\x86" * 60
    for rest in (b".", b"}q\x01h\x00K\x01s.", b"h\x00\x93."):
        try:
            read_plain_pickle(bomb + rest)
        except ValueError as error:
            assert len(str(error)) < 100
    assert capsys.readouterr().out == ""


def test_no_damage_to_a_pickle_gets_past(tmp_path):
    """Every truncation and 1000 changed bytes: a value or one line, and no name but NumPy's is ever looked up."""
    good = python2_pickle({b"labels": [1, 2], b"data": np.arange(6, dtype=np.uint8).reshape(2, 3)})
    np.testing.assert_array_equal(read_plain_pickle(good)[b"data"], [[0, 1, 2], [3, 4, 5]])
    assert "BINSTRING" in {opcode.name.replace("SHORT_", "") for opcode, *_ in pickletools.genops(good)}
    rng = np.random.default_rng(0)
    damaged = [good[:size] for size in range(len(good))]
    for _ in range(1000):
        data = bytearray(good)
        data[rng.integers(len(data))] = rng.integers(256)
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        try:
            read_plain_pickle(data)
        except ValueError:
            refused += 1
    assert refused > len(good) + 300


BAD_CIFAR = {
    "truncated": (
        {"data_batch_3.bin": lambda data: data[:-1]},
        "data_batch_3.bin: expected records of 3073 bytes, got",
    ),
    "empty": ({"test_batch.bin": lambda data: b""}, "got 0 bytes"),
    "label": ({"data_batch_2.bin": lambda data: b"\x0b" + data[1:]}, "expected labels from 0 to 9, got 11"),
    "missing": ({"data_batch_5.bin": None}, "data_batch_5.bin: expected this file of CIFAR-10, found none"),
}


@pytest.mark.parametrize("case", BAD_CIFAR)
def test_damaged_binary_cifar_is_named(tmp_path, case):
    changes, message = BAD_CIFAR[case]
    for name, data in cifar_files("binary").items():
        change = changes.get(name, lambda data: data)
        if change:
            (tmp_path / name).write_bytes(change(data))
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python2_pickle({b"labels": [1], b"data": [1]}), r"expected data of shape \(n, 3072\)"),
        (python2_pickle({b"labels": [10], b"data": np.zeros((1, 3072), np.uint8)}), "labels from 0 to 9"),
        (pickle.dumps([1.5j], 2), "would call"),
        (b"\x80\x02}", "got pickle exhausted before seeing STOP"),
        (b"hello", "data_batch_1: expected a pickled dictionary"),
        (pickle.dumps({b"labels": [1], b"data": np.zeros((1, 3072))}, 2), "anything but whole numbers"),
    ],
)
def test_damaged_python_cifar_is_named(tmp_path, content, message):
    for name, data in (cifar_files("python 2") | {"data_batch_1": content}).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(tmp_path)
    assert "\n" not in str(caught.value) and "data_batch_1" in str(caught.value)


def test_an_archive_that_is_none(tmp_path):
    whole = tmp_path / "whole.tar.gz"
    write_archive(whole, cifar_files("binary"))
    path = tmp_path / "cifar.tar.gz"
    for data, message in ((b"hello", "readable tar archive"), (whole.read_bytes()[:5000], "readable tar archive")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            load_cifar_dataset(path)
    write_archive(path, {"README": b"hello"})
    with pytest.raises(ValueError, match="expected this file of CIFAR-10, found none"):
        load_cifar_dataset(path)


# Folders of images


def write_images(root, num, mode="L", size=(6, 5), classes=("cat", "dog", "eel")):
    """Image i of class c is filled with the value 20 c + i."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(num):
            Image.new(mode, size, 20 * c + i if mode == "L" else (20 * c + i, 0, 255)).save(
                root / name / f"{i:02d}.png"
            )


def test_images_by_class_and_split(tmp_path):
    write_images(tmp_path / "train", 6)
    write_images(tmp_path / "test", 2, classes=("dog", "eel"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    dataset = load_dataset(tmp_path)
    assert (dataset.input_shape, dataset.num_classes) == ((5, 6, 1), 3)
    assert [len(getattr(dataset, split).labels) for split in SPLITS] == [15, 3, 4]
    np.testing.assert_array_equal(np.bincount(dataset.validation.labels), [1, 1, 1])
    # Classes are numbered by their names in training: dogs are 1 also where there are no cats.
    np.testing.assert_array_equal(dataset.test.labels, [1, 1, 2, 2])
    np.testing.assert_array_equal(dataset.test.images[:, 0, 0, 0] * np.float32(255), [0, 1, 20, 21])


def test_images_by_class_alone(tmp_path):
    write_images(tmp_path, 5, mode="RGB")
    dataset = load_dataset(tmp_path)
    assert dataset.input_shape == (5, 6, 3)
    assert [len(getattr(dataset, split).labels) for split in SPLITS] == [9, 3, 3]
    np.testing.assert_allclose(dataset.test.images[:, 0, 0] * 255, [[0, 0, 255], [20, 0, 255], [40, 0, 255]])


def test_images_are_resized_if_asked(tmp_path):
    write_images(tmp_path, 5)
    Image.new("L", (12, 12), 7).save(tmp_path / "cat" / "99.png")
    with pytest.raises(ValueError, match=r"99.png: expected 6 x 5 pixels .* got 12 x 12; resize"):
        load_dataset(tmp_path)
    assert load_image_folder(tmp_path, size=8).input_shape == (8, 8, 1)


def test_images_that_are_none_are_named(tmp_path):
    write_images(tmp_path / "train", 3)
    write_images(tmp_path / "test", 1, classes=("fox",))
    with pytest.raises(ValueError, match="test split: expected classes of the training split, got 'fox'"):
        load_dataset(tmp_path)
    (tmp_path / "test" / "fox").rename(tmp_path / "test" / "dog")
    bad, good = tmp_path / "test" / "dog" / "bad.png", (tmp_path / "test" / "dog" / "00.png").read_bytes()
    deep = io.BytesIO()
    Image.new("I;16", (6, 5)).save(deep, "png")
    for data, reason in (
        (b"hello", "cannot identify"),
        (good[:45], "truncated"),
        (deep.getvalue(), "more than 8 bits"),
    ):
        bad.write_bytes(data)
        with pytest.raises(
            ValueError, match=rf"bad.png: expected an image of 8 bits per channel, got .*{reason}"
        ) as caught:
            load_dataset(tmp_path)
        assert "\n" not in str(caught.value)


# CSV


def csv_text(images, labels, header=True):
    names = [",".join(["label", *(f"pixel{i}" for i in range(images[0].size))])] if header else []
    rows = [",".join(map(str, [label, *image.ravel().tolist()])) for image, label in zip(images, labels, strict=True)]
    return "\n".join([*names, *rows]) + "\n"


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_csv(tmp_path, header, channels):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 4, 4, channels)), np.arange(20) % 2
    (tmp_path / "one.csv").write_text(csv_text(images, labels, header))
    one = load_dataset(tmp_path / "one.csv")
    assert [len(getattr(one, split).labels) for split in SPLITS] == [12, 4, 4]
    for split in SPLITS[::2]:
        (tmp_path / f"{split}.csv").write_text(csv_text(images / 255, labels, header))
    folder = load_dataset(tmp_path)
    np.testing.assert_allclose(folder.test.images, images / 255, rtol=1e-6)
    np.testing.assert_array_equal(folder.test.labels, labels)
    assert folder.input_shape == one.input_shape == (4, 4, channels)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("label,", "class,", "expected a column 'label' in the header, got class, pixel0"),
        ("\n0,7", "\n0,7,7", "expected a row of numbers for each image, got"),
        ("\n0,7", "\n0,x", "expected a row of numbers"),
        ("\n0,7", "\n0.5,7", "labels that are whole numbers, got 0.5"),
        ("\n0,7", "\nnan,7", "labels that are whole numbers, got nan"),
        ("\n0,7", "\n-1,7", "labels from 0 on, got -1"),
        ("\n0,7", "\n0,256", "pixels from 0 to 255, got 7 to 256"),
        ("\n0,7", "\n0,nan", "expected finite pixels, got NaN"),
        ("\n0,7", "\n0,7.5", r"expected pixels in \[0, 1\], got"),
        (",pixel3", "", "expected a row|square number"),
    ],
)
def test_bad_csv_is_named(tmp_path, old, new, message):
    path, text = tmp_path / "bad.csv", csv_text(np.full((10, 2, 2, 1), 7), np.arange(10) % 2)
    assert old in text
    text = text.replace(old, new, 1) if old != ",pixel3" else csv_text(np.full((10, 2, 4, 1), 7), np.arange(10) % 2)
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(path)
    assert "bad.csv" in str(caught.value) and "\n" not in str(caught.value)


# By user


def leaf(num_users, per_user=8, num_classes=2):
    """User u has images filled with u / 100, labels 0, 1, 0, 1, ..."""
    data = {
        f"f{u:03d}": {"x": [[u / 100] * 16] * per_user, "y": [i % num_classes for i in range(per_user)]}
        for u in range(num_users)
    }
    return {"users": list(data), "num_samples": [per_user] * num_users, "user_data": data}


def test_users_are_in_one_split_only(tmp_path):
    content = leaf(11)
    halves = [dict(list(content["user_data"].items())[i::2]) for i in range(2)]
    for split, half in zip(("train", "test"), halves, strict=True):
        (tmp_path / split).mkdir()
        (tmp_path / split / "all_data_0.json").write_text(json.dumps({"user_data": half}))
    (tmp_path / "test" / "more.json").write_text(json.dumps({"user_data": {"f000": {"x": [[0.0] * 16], "y": [1]}}}))
    dataset = load_dataset(tmp_path)
    of_user = [sorted({round(100 * x) for x in getattr(dataset, s).images[:, 0, 0, 0].tolist()}) for s in SPLITS]
    assert of_user == [[2, 3, 4, 7, 8, 9], [1, 6], [0, 5, 10]]
    np.testing.assert_array_equal(np.bincount(dataset.test_users), [9, 8, 8])  # f000 has a sample more

    task = make_personalisation(dataset, seed=1, samples_per_class=3)
    np.testing.assert_array_equal(np.bincount(task.adaptation.labels), [2, 2]), "at most half of the four of each class"
    for examples, num in ((task.adaptation, 4), (task.evaluation, 4)):
        assert len(examples.labels) == num
        np.testing.assert_allclose(examples.images, 0.05)
    assert len(task.dataset.test.labels) == 17 and not np.any(task.dataset.test.images == np.float32(0.05))
    for user in (-1, 3):
        with pytest.raises(ValueError, match=rf"expected a user in 0..2 .* got user {user}"):
            make_personalisation(dataset, user)


BAD_USERS = {
    "foreign": ({"users": {}}, "expected 'user_data' with samples by user"),
    "a list": ([1], "expected 'user_data'"),
    "few": (leaf(2), "expected at least three users, one for each split, got 2"),
    "no labels": ({"user_data": {"a": {"x": [[1.0]]}}}, "user a: expected lists 'x' and 'y'"),
    "ragged": ({"user_data": {"a": {"x": [[1.0], [1.0, 2.0]], "y": [0, 0]}}}, "samples of numbers, all of one length"),
    "text": ({"user_data": {"a": {"x": ["call me"], "y": [0]}}}, "samples of numbers"),
    "real": ({"user_data": {"a": {"x": [[0.0]], "y": [0.5]}}}, "labels of an integer dtype"),
    "NaN": ({"user_data": {"a": {"x": [[float("nan")]], "y": [0]}}}, "finite pixels"),
    "range": ({"user_data": {"a": {"x": [[255.0]], "y": [0]}}}, r"pixels in \[0, 1\]"),
    "lengths": ({"user_data": {"a": {"x": [[0.0]], "y": [0, 1]}}}, "one label for each of 1 images"),
    "no square": ({"user_data": {"a": {"x": [[0.0] * 7], "y": [0]}}}, "square number of pixels .* got 7"),
}


@pytest.mark.parametrize("case", BAD_USERS)
def test_bad_user_files_are_named(tmp_path, case):
    content, message = BAD_USERS[case]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(path)
    assert "bad.json" in str(caught.value) and "\n" not in str(caught.value)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="expected JSON"):
        load_dataset(path)


# Streams


def test_streams_of_batches_and_of_examples():
    images, labels = batch(0, 40)
    batches = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 40, 16)]
    singles = (
        {"image": Image.fromarray(image), "label": int(label)} for image, label in zip(images, labels, strict=True)
    )
    by_batch, by_single = (
        collect_dataset("a", batches, batches),
        collect_dataset("b", singles, [Examples(images, labels)]),
    )
    for split in SPLITS:
        for one, other in zip(getattr(by_batch, split), getattr(by_single, split), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(by_batch.test.images * np.float32(255), images)

    def without_end():
        while True:
            yield images, labels

    assert len(collect_dataset("c", without_end(), batches, max_items=3).train.labels) == 100


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "train split: expected batches or examples, got an empty stream"),
        ([np.ones(3)], r"item 0: expected a pair \(images, labels\) or a mapping, got ndarray"),
        ([{"picture": 1}], "item 0: expected an image and a label, got picture"),
        ([(np.zeros((2, 4, 4)), [0, 1]), (np.zeros((2, 5, 4)), [0, 1])], "item 1: expected images of shape .* resize"),
        ([(np.full((2, 4, 4), np.nan), [0, 1])], "item 0: expected finite pixels"),
        ([(np.zeros((2, 4, 4)), [0])], "one label for each of 2 images"),
    ],
)
def test_bad_streams_are_explained(items, message):
    with pytest.raises(ValueError, match=message):
        collect_dataset("mine", items, items)


def test_a_dataset_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "stream_data.py").write_text(
        "import numpy as np\nfrom nets.data_streams import collect_dataset\n"
        "def make():\n    items = [(np.zeros((8, 4, 4)), np.arange(8) % 2)]\n    return collect_dataset('own', items, items)\n"
        "def nothing():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_dataset("stream_data:make").name == "own"
    for name, message in (("nothing", "got int"), ("missing", "AttributeError")):
        with pytest.raises(ValueError, match=rf"stream_data:{name}: expected .*{message}"):
            load_dataset(f"stream_data:{name}")
    with pytest.raises(ValueError, match="got ModuleNotFoundError"):
        load_dataset("not_there:make")


def test_splits_of_a_source_without_any():
    examples = make_examples("some", np.zeros((10, 2, 2)), np.repeat([1, 0], 5))
    dataset = assemble_dataset("some", {"train": examples}, None)
    for split, per_class in zip(SPLITS, (3, 1, 1), strict=True):
        np.testing.assert_array_equal(np.bincount(getattr(dataset, split).labels), per_class)
