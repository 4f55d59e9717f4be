"""Data: splits, batches, augmentation, files from outside, the personalisation task."""

import gzip
import struct

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nets.data import (
    Examples,
    batches,
    load_digits_dataset,
    make_dataset,
    make_examples,
    shift_images,
    stratified_places,
    take,
)
from nets.dataset_files import load_dataset, load_idx_dataset, load_npz_dataset, read_idx
from nets.personalisation import Writer, make_personalisation, make_writer, write

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    return load_digits_dataset()


def rows(examples: Examples) -> set[bytes]:
    return {image.tobytes() + bytes([label]) for image, label in zip(*examples, strict=True)}


def random_arrays(num_train=30, num_test=10, num_classes=3, shape=(6, 5)):
    """Bytes and labels as an npz file holds them; every class occurs."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (num_train, *shape), np.uint8),
        "y_train": np.arange(num_train) % num_classes,
        "x_test": rng.integers(0, 256, (num_test, *shape), np.uint8),
        "y_test": np.arange(num_test) % num_classes,
    }


def idx_bytes(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_idx_folder(folder, arrays, compress=()):
    names = {"x_train": "train-images-idx3-ubyte", "y_train": "train-labels-idx1-ubyte"}
    names |= {"x_test": "t10k-images-idx3-ubyte", "y_test": "t10k-labels-idx1-ubyte"}
    for key, name in names.items():
        data = idx_bytes(arrays[key])
        if key in compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)


# Digits and batches


def test_digits_are_split_once_and_for_all(digits):
    assert [len(getattr(digits, split).labels) for split in SPLITS] == [1077, 360, 360]
    original = load_digits()
    everything = np.concatenate([getattr(digits, split).images for split in SPLITS])
    # Disjoint and complete: the same multiset of images.
    assert sorted(image.tobytes() for image in everything) == sorted(
        image.tobytes() for image in (original.images[..., None] / 16).astype(np.float32)
    )
    for split in SPLITS:
        examples = getattr(digits, split)
        shares = np.bincount(examples.labels, minlength=10) / len(examples.labels)
        np.testing.assert_allclose(shares, np.bincount(original.target) / 1797, atol=1 / 360)
        assert examples.images.dtype == np.float32
        assert examples.labels.dtype == np.int32
    # The first zero of the original set is in the test split, the second in the validation split.
    first, second = original.images[original.target == 0][:2]
    np.testing.assert_array_equal(digits.test.images[digits.test.labels == 0][0, ..., 0] * 16, first)
    np.testing.assert_array_equal(digits.validation.images[digits.validation.labels == 0][0, ..., 0] * 16, second)
    assert digits.input_shape == (8, 8, 1)


def test_stratified_places_by_hand():
    np.testing.assert_array_equal(stratified_places(np.array([2, 0, 1, 0, 2])), [3, 0, 2, 1, 4])


def test_the_first_examples_of_a_split_show_every_class(digits):
    """Splits are not sorted by label: their beginning may serve for calibration."""
    assert len(set(digits.train.labels[:64].tolist())) == 10


def test_batches_depend_on_seed_and_epoch_only(digits):
    def epoch_of(seed, epoch):
        return list(batches(digits, 128, seed, epoch, max_shift=1))

    first, again = epoch_of(3, 1), epoch_of(3, 1)
    assert len(first) == 1077 // 128
    for batch, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(batch.images, same.images)
        np.testing.assert_array_equal(batch.labels, same.labels)
    for other in (epoch_of(4, 1), epoch_of(3, 2), epoch_of(1, 3)):
        assert not np.array_equal(first[0].labels, other[0].labels)


def test_an_epoch_shows_every_example_once(digits):
    seen = list(batches(digits, 359, seed=0, epoch=0))
    assert len(seen) == 3
    assert len(set().union(*(rows(batch) for batch in seen))) == 1077
    assert set().union(*(rows(batch) for batch in seen)) == rows(digits.train)


@pytest.mark.parametrize("batch_size", [0, 1078])
def test_a_bad_batch_size_is_explained(digits, batch_size):
    with pytest.raises(ValueError, match=rf"expected batch_size in 1..1077, the training split, got {batch_size}"):
        next(batches(digits, batch_size, 0, 0))


def test_shift_by_hand():
    image = np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1) + 1
    moved = shift_images(np.repeat(image, 3, 0), np.array([[0, 0], [1, 0], [0, -1]]), np.float32([9]))
    expected = [[[1, 2, 3], [4, 5, 6]], [[9, 9, 9], [1, 2, 3]], [[2, 3, 9], [5, 6, 9]]]
    np.testing.assert_array_equal(moved[..., 0], expected)


def test_augmentation_moves_in_the_background_of_normalised_images():
    arrays = random_arrays(num_train=12)
    train, test = (make_examples("random", arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in ("train", "test"))
    dataset = make_dataset("random", train, test, test, 3, standardise=True)
    background = dataset.from_pixels(np.zeros(1, np.float32))
    shifted, _ = next(batches(dataset, 12, seed=0, epoch=0, max_shift=5))
    assert np.sum(shifted == background) > 12 * 5


def test_standardised_channels_have_mean_0_and_variance_1():
    rng = np.random.default_rng(0)
    examples = make_examples("colours", rng.integers(0, 256, (20, 4, 4, 3), np.uint8), np.arange(20) % 2)
    dataset = make_dataset("colours", examples, examples, examples, 2, standardise=True)
    np.testing.assert_allclose(dataset.train.images.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(dataset.train.images.std((0, 1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(dataset.to_pixels(dataset.test.images), examples.images, atol=1e-6)
    np.testing.assert_allclose(dataset.from_pixels(examples.images), dataset.test.images, atol=1e-6)


# Files


@pytest.mark.parametrize("compress", [(), ("x_train", "y_test")])
def test_idx_folder(tmp_path, compress):
    arrays = random_arrays()
    write_idx_folder(tmp_path, arrays, compress)
    dataset = load_dataset(tmp_path)
    assert [len(getattr(dataset, split).labels) for split in SPLITS] == [25, 5, 10]
    assert dataset.input_shape == (6, 5, 1)
    assert dataset.num_classes == 3
    np.testing.assert_allclose(dataset.test.images[..., 0], arrays["x_test"] / 255, rtol=1e-6)
    both = np.concatenate([dataset.train.images, dataset.validation.images])[..., 0]
    expected = arrays["x_train"].astype(np.float32) / np.float32(255)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in expected)


@pytest.mark.parametrize("with_validation", [False, True])
def test_npz_file(tmp_path, with_validation):
    arrays = random_arrays(shape=(4, 4, 3))
    arrays["y_train"] = arrays["y_train"][:, None]
    arrays["x_test"] = (arrays["x_test"] / 255).astype(np.float64)
    if with_validation:
        arrays |= {"x_validation": arrays["x_train"][:7], "y_validation": arrays["y_train"][:7]}
    np.savez_compressed(tmp_path / "colours.npz", **arrays)
    dataset = load_dataset(str(tmp_path / "colours.npz"), standardise=True)
    sizes = [len(getattr(dataset, split).labels) for split in SPLITS]
    assert sizes == ([30, 7, 10] if with_validation else [25, 5, 10])
    assert dataset.input_shape == (4, 4, 3)
    np.testing.assert_allclose(dataset.to_pixels(dataset.test.images), arrays["x_test"], atol=1e-6)


def test_the_digits_by_name(digits):
    np.testing.assert_array_equal(load_dataset("digits").test.images, digits.test.images)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "found nothing there; did you mean 'digits'"),
        ("missing/mnist.npz", "mnist.npz: expected .* check the path"),
    ],
)
def test_a_dataset_that_is_not_there(source, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(source)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"expected 18 bytes for an array of shape \(3, 2\), got 17; the file is truncated"),
        (lambda data: data + b"\0", r"expected 18 bytes for an array of shape \(3, 2\), got 19"),
        (lambda data: data[:6], "truncated or damaged"),
        (lambda data: b"", "got a file that begins with nothing"),
        (lambda data: b"\x89PNG" + data, "begins with 89 50 4e 47; is it the right file"),
        (lambda data: b"\0\0\x0d" + data[3:], "expected an IDX file of unsigned bytes"),
        (lambda data: gzip.compress(data)[:-3], "expected a readable IDX file, got .*; fetch the file again"),
        (lambda data: gzip.compress(data)[:15] + b"\xff\xff\xff", "expected a readable IDX file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, message):
    path = tmp_path / "some-idx2-ubyte"
    data = idx_bytes(np.arange(6).reshape(3, 2))
    path.write_bytes(data)
    np.testing.assert_array_equal(read_idx(path), np.arange(6).reshape(3, 2))
    path.write_bytes(damage(data))
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_idx_file_that_is_missing_is_named(tmp_path):
    write_idx_folder(tmp_path, random_arrays())
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"expected a file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"):
        load_idx_dataset(tmp_path)


BAD_CONTENTS = {
    "labels of another file": (
        {"y_train": np.arange(29) % 3},
        r"train split: expected one label for each of 30 images",
    ),
    "negative label": ({"y_test": np.arange(10) - 1}, r"test split: expected labels from 0 on, got -1"),
    "label out of range": ({"y_test": np.arange(10)}, r"test split: expected labels in \[0, 3\), got 9"),
    "gap in labels": ({"y_train": (np.arange(30) % 3) * 5}, r"without gaps, got 0 to 10, 3 different ones"),
    "real labels": ({"y_train": np.arange(30) / 3}, r"expected labels of an integer dtype, got float64"),
    "NaN": ({"x_test": np.full((10, 6, 5), np.nan)}, r"expected finite pixels, got NaN or infinity in 10 images"),
    "not scaled": ({"x_test": np.full((10, 6, 5), 255.0)}, r"expected pixels in \[0, 1\], got 255 to 255"),
    "wide integers": ({"x_test": np.ones((10, 6, 5), np.int64)}, r"expected images of dtype uint8 or floats"),
    "flat images": ({"x_test": np.ones((10, 30), np.uint8)}, r"expected images of shape \(n, height, width\)"),
    "no images": ({"x_test": np.ones((0, 6, 5), np.uint8)}, r"none of them 0, got \(0, 6, 5\)"),
    "other size": ({"x_test": np.ones((10, 7, 5), np.uint8)}, r"expected images of shape \(6, 5, 1\) like those"),
    "one class": ({"y_train": np.zeros(30, int)}, r"expected at least two classes, got 1"),
    "pickle": ({"y_test": np.array([{}] * 10)}, r"expected an npz file of plain arrays, got .*allow_pickle=False"),
}


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_bad_contents_of_an_npz_file_are_explained(tmp_path, case):
    replacement, message = BAD_CONTENTS[case]
    path = tmp_path / "bad.npz"
    np.savez(path, **random_arrays() | replacement)
    with pytest.raises(ValueError, match=message) as caught:
        load_npz_dataset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_array_is_named(tmp_path):
    arrays = random_arrays()
    del arrays["y_test"]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=r"expected an array 'y_test', got x_train, y_train, x_test; save with"):
        load_npz_dataset(tmp_path / "bad.npz")


def test_a_foreign_file_is_not_an_npz_file(tmp_path):
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("array.npy", "text.npz", "empty.npz"):
        with pytest.raises(ValueError, match=rf"{name}: expected an npz file of plain arrays"):
            load_npz_dataset(tmp_path / name)


def test_no_damage_to_a_file_gets_past_the_checks(tmp_path):
    """Truncated anywhere or with any byte flipped, a file is either refused in one line or its checksum still holds."""
    np.savez_compressed(tmp_path / "good.npz", **random_arrays())
    good, path = (tmp_path / "good.npz").read_bytes(), tmp_path / "damaged.npz"
    intact = load_npz_dataset(tmp_path / "good.npz")
    rng = np.random.default_rng(0)
    for trial in range(300):
        data = bytearray(good)
        if trial % 2:
            del data[rng.integers(len(data)) :]
        else:
            data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            dataset = load_npz_dataset(path)
        except ValueError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
        else:
            for split in SPLITS:
                np.testing.assert_array_equal(getattr(dataset, split).images, getattr(intact, split).images)


def test_a_constant_channel_cannot_be_standardised():
    examples = make_examples("grey", np.full((4, 4, 4), 7, np.uint8), np.arange(4) % 2)
    with pytest.raises(ValueError, match="expected channels that vary, got a constant one"):
        make_dataset("grey", examples, examples, examples, 2, standardise=True)


def test_an_empty_split_is_named():
    examples = make_examples("grey", np.full((4, 4, 4), 7, np.uint8), np.arange(4) % 2)
    with pytest.raises(ValueError, match="grey, validation split: expected examples, got none"):
        make_dataset("grey", examples, take(examples, np.arange(0)), examples, 2)


# Personalisation


def test_a_writer_changes_pixels_but_neither_labels_nor_range(digits):
    task = make_personalisation(digits, seed=0)
    assert len(task.adaptation.labels) == 50
    assert len(task.evaluation.labels) == 310
    np.testing.assert_array_equal(np.bincount(task.adaptation.labels), 5)
    np.testing.assert_array_equal(task.evaluation.labels, task.dataset.test.labels)
    assert task.evaluation.images.dtype == np.float32
    for examples in (task.adaptation, task.evaluation):
        assert 0 <= examples.images.min() < examples.images.max() <= 1
    changed = np.abs(task.evaluation.images - task.dataset.test.images).max((1, 2, 3))
    assert changed.min() > 0.1
    # None of the adaptation digits is tested in its original form.
    originals = rows(digits.test) - rows(task.dataset.test)
    assert len(originals) == 50
    np.testing.assert_array_equal(task.dataset.train.images, digits.train.images)


def test_a_writer_follows_the_seed(digits):
    tasks = [make_personalisation(digits, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(tasks[0].evaluation.images, tasks[1].evaluation.images)
    assert not np.array_equal(tasks[0].evaluation.images, tasks[2].evaluation.images)
    assert len({make_writer(seed) for seed in range(20)}) == 20
    for seed in range(20):
        writer = make_writer(seed)
        assert 0.05 <= abs(writer.slant) <= 0.2
        assert writer.slant * writer.rotation < 0


def test_writing_by_hand():
    """A vertical bar, one column wide, in the middle of 7 x 7 pixels."""
    bar = np.zeros((1, 7, 7, 1), np.float32)
    bar[0, 1:6, 3] = 1
    plain = Writer(rotation=0.0, slant=0.0, size=1.0, stroke=0.0)
    np.testing.assert_allclose(write(bar, plain), bar, atol=1e-6)
    quarter = write(bar, Writer(rotation=np.pi / 2, slant=0.0, size=1.0, stroke=0.0))
    np.testing.assert_allclose(quarter, bar.transpose(0, 2, 1, 3), atol=1e-5)
    # slant 1: each row moves right by its height above the centre, so that the bar becomes a diagonal "/".
    slanted = write(bar, Writer(rotation=0.0, slant=1.0, size=1.0, stroke=0.0))[0, ..., 0]
    expected = np.fliplr(np.eye(7))
    expected[[0, 6], [6, 0]] = 0
    np.testing.assert_allclose(slanted, expected, atol=1e-5)
    thick = write(bar, Writer(rotation=0.0, slant=0.0, size=1.0, stroke=0.5))[0, 3, :, 0]
    np.testing.assert_allclose(thick, [0, 0, 0.5, 1, 0.5, 0, 0], atol=1e-5)
    thin = write(bar, Writer(rotation=0.0, slant=0.0, size=1.0, stroke=-0.25))[0, 3, :, 0]
    np.testing.assert_allclose(thin, [0, 0, 0, 0.75, 0, 0, 0], atol=1e-5)


def test_images_are_written_one_by_one(digits):
    pixels, writer = digits.test.images[:5], make_writer(0)
    np.testing.assert_array_equal(write(pixels, writer)[2:3], write(pixels[2:3], writer))
    assert write(np.repeat(pixels, 3, -1), writer).shape == (5, 8, 8, 3)


@pytest.mark.parametrize("samples_per_class", [0, 18])
def test_a_bad_number_of_samples_is_explained(digits, samples_per_class):
    with pytest.raises(ValueError, match=rf"expected samples_per_class in 1..17 .* got {samples_per_class}"):
        make_personalisation(digits, 0, samples_per_class)
