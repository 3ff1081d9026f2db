import gzip
import io
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from PIL import Image

from psl_flower.app import array_cache, parquet
from psl_flower.app.array_cache import cached_arrays
from psl_flower.app.datasets import SPECS, load_arrays
from psl_flower.app.idx import read_idx
from psl_flower.errors import ConfigError
from psl_flower.torchvision_compat import import_torchvision

import_torchvision()
from torchvision import datasets as torchvision_datasets  # noqa: E402  (needs the line above beside a CPU-only torch)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache folder of the test's own, and nothing kept in the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_arrays.cache_clear()
    yield
    load_arrays.cache_clear()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def random_arrays(name, count, seed=0):
    spec = SPECS[name]
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *spec.shape), dtype=np.uint8), rng.integers(0, spec.num_classes, count)


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder, prefix, images, labels, *, compressed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
        content = idx_bytes(array)
        if compressed:
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{prefix}-{name}-ubyte").write_bytes(content)


def encode(image):
    pixels = image.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, *, image_column="img", label_column="label", struct_column=True):
    content = [encode(image) for image in images]
    values = [{"bytes": c, "path": None} for c in content] if struct_column else content
    pq.write_table(pyarrow.table({image_column: values, label_column: labels}), path)


def same(loaded, images, labels):
    return np.array_equal(loaded[0], images) and np.array_equal(loaded[1], labels) and loaded[1].dtype == np.int64


# --- digits ----------------------------------------------------------------------------------------------------------
def test_digits_split_into_1437_and_360_examples_of_every_class():
    train, test = load_arrays("digits", "train"), load_arrays("digits", "test")
    assert train[0].shape == (1437, 1, 8, 8)
    assert test[0].shape == (360, 1, 8, 8)
    for images, labels in (train, test):
        assert images.dtype == np.uint8
        assert images.max() == 255
        share = np.bincount(labels) / len(labels)
        assert share.min() > 0.09
        assert share.max() < 0.11


def test_digits_mean_and_std_are_the_training_pixels():
    pixels = load_arrays("digits", "train")[0] / 255
    assert SPECS["digits"].mean == pytest.approx((pixels.mean(),), abs=1e-4)
    assert SPECS["digits"].std == pytest.approx((pixels.std(),), abs=1e-4)


def test_digits_takes_no_data_path(folder):
    with pytest.raises(ConfigError, match="takes no data-path"):
        load_arrays("digits", "train", str(folder))


def test_a_split_is_read_once_in_a_process():
    assert load_arrays("digits", "test")[0] is load_arrays("digits", "test")[0]


# --- idx -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(folder, compressed):
    train, test = random_arrays("fashion-mnist", 12), random_arrays("fashion-mnist", 5, seed=1)
    write_idx(folder, "train", *train, compressed=compressed)
    write_idx(folder, "t10k", *test, compressed=compressed)
    assert same(load_arrays("fashion-mnist", "train", str(folder)), *train)
    assert same(load_arrays("fashion-mnist", "test", str(folder)), *test)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file"),
        (b"\x00\x00\x0d\x01" + bytes(8), "is not an idx file of unsigned bytes"),
        (struct.pack(">HBBI", 0, 8, 1, 5) + b"1234", r"header names \(5,\), 5 bytes, but 4 follow"),
        (struct.pack(">HBBI", 0, 8, 3, 5), "is damaged"),
    ],
)
def test_a_damaged_idx_file_is_refused(folder, content, message):
    (folder / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_idx(folder / "x")


def test_a_truncated_gzip_file_is_refused(folder):
    (folder / "x.gz").write_bytes(gzip.compress(idx_bytes(np.arange(200)))[:-20])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_idx(folder / "x.gz")


def test_a_gzip_file_with_flipped_bytes_is_refused(folder):
    content = bytearray(gzip.compress(idx_bytes(np.arange(200))))
    content[20] ^= 0xFF
    (folder / "x.gz").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_idx(folder / "x.gz")


# --- parquet ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("cifar10", {}),
        ("cifar100", {"label_column": "fine_label"}),
        ("fashion-mnist", {"image_column": "image"}),
        ("cifar10", {"struct_column": False}),
    ],
)
def test_parquet_files_with_the_hubs_columns(folder, name, columns):
    images, labels = random_arrays(name, 9)
    write_parquet(folder / "train.parquet", images, labels, **columns)
    assert same(load_arrays(name, "train", str(folder)), images, labels)


def test_shards_follow_one_another(folder):
    images, labels = random_arrays("cifar10", 9)
    write_parquet(folder / "test-00001-of-00002.parquet", images[4:], labels[4:])
    write_parquet(folder / "test-00000-of-00002.parquet", images[:4], labels[:4])
    assert same(load_arrays("cifar10", "test", str(folder)), images, labels)


def test_parquet_is_decoded_once_and_again_when_the_file_changes(folder, monkeypatch):
    decoded = []
    original = parquet._decode
    monkeypatch.setattr(parquet, "_decode", lambda *args: decoded.append(1) or original(*args))
    first, second = random_arrays("cifar10", 4), random_arrays("cifar10", 4, seed=1)
    path = folder / "train.parquet"
    write_parquet(path, *first)
    for _ in range(2):
        load_arrays.cache_clear()  # as another process would find it
        assert same(load_arrays("cifar10", "train", str(folder)), *first)
    assert len(decoded) == 4
    write_parquet(path, *second)
    os.utime(path, ns=(1, 1))  # whatever the file system's clock resolves
    load_arrays.cache_clear()
    assert same(load_arrays("cifar10", "train", str(folder)), *second)


def test_cached_images_are_mapped_not_read(folder):
    write_parquet(folder / "train.parquet", *random_arrays("cifar10", 4))
    images = load_arrays("cifar10", "train", str(folder))[0]
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable


def test_progress_names_the_file_and_the_time_left(folder, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(parquet, "_ROWS_AT_ONCE", 2)
    monkeypatch.setattr(parquet._log, "propagate", True)
    write_parquet(folder / "train.parquet", *random_arrays("cifar10", 4))
    with caplog.at_level("INFO", logger=parquet._log.name):
        parquet._log.addHandler(caplog.handler)
        try:
            load_arrays("cifar10", "train", str(folder))
        finally:
            parquet._log.removeHandler(caplog.handler)
    assert any("decoding train.parquet: 2 of 4 images" in line for line in caplog.messages)


def test_a_missing_column_is_named(folder):
    images, labels = random_arrays("cifar10", 2)
    write_parquet(folder / "train.parquet", images, labels, label_column="class")
    with pytest.raises(ConfigError, match=r"must have a column 'fine_label' or 'label', it has \['img', 'class'\]"):
        load_arrays("cifar10", "train", str(folder))


def test_bytes_that_are_no_image_are_refused(folder):
    pq.write_table(pyarrow.table({"img": [{"bytes": b"no"}], "label": [0]}), folder / "train.parquet")
    with pytest.raises(ConfigError, match=r"image 0 of .* cannot be decoded"):
        load_arrays("cifar10", "train", str(folder))


def test_images_of_another_size_are_refused(folder):
    write_parquet(folder / "train.parquet", *random_arrays("fashion-mnist", 2))
    with pytest.raises(ConfigError, match=r"must be 32 x 32 pixels, image 0 of .* is \(28, 28\)"):
        load_arrays("cifar10", "train", str(folder))


def test_a_file_that_is_no_parquet_is_refused(folder):
    (folder / "train.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        load_arrays("cifar10", "train", str(folder))


def test_labels_out_of_range_are_refused(folder):
    images, _ = random_arrays("cifar10", 2)
    write_parquet(folder / "train.parquet", images, [3, 10])
    with pytest.raises(ConfigError, match=r"labels of cifar10 are 0 to 9, those of .* 3 to 10"):
        load_arrays("cifar10", "train", str(folder))


# --- where data is looked for ----------------------------------------------------------------------------------------
def test_an_empty_folder_is_refused_with_what_was_looked_for(folder):
    with pytest.raises(ConfigError, match=r"t10k-images-idx3-ubyte.*test\*\.parquet.*holds neither"):
        load_arrays("fashion-mnist", "test", str(folder))
    with pytest.raises(ConfigError, match="is not a folder"):
        load_arrays("fashion-mnist", "test", str(folder / "absent"))


def test_images_without_as_many_labels_are_refused(folder):
    images, labels = random_arrays("fashion-mnist", 4)
    write_idx(folder, "train", images, labels[:3])
    with pytest.raises(ConfigError, match="4 images, 3 labels"):
        load_arrays("fashion-mnist", "train", str(folder))


def test_idx_images_of_another_shape_are_refused(folder):
    images, labels = random_arrays("digits", 4)
    write_idx(folder, "train", images, labels)
    with pytest.raises(ConfigError, match=r"have shape \(1, 28, 28\), those of .* \(1, 8, 8\)"):
        load_arrays("fashion-mnist", "train", str(folder))


def test_torchvisions_copy_is_used_without_a_data_path(tmp_path):
    images, labels = random_arrays("fashion-mnist", 6)
    raw = tmp_path / "cache" / "psl_flower" / "torchvision" / "FashionMNIST" / "raw"
    for prefix in ("train", "t10k"):
        write_idx(raw, prefix, images, labels)
    assert same(load_arrays("fashion-mnist", "train"), images, labels)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvisions_colour_images_are_put_channels_first(name, monkeypatch):
    images, labels = random_arrays(name, 6)

    class Downloaded:
        def __init__(self, root, *, train, download):
            assert not train
            assert download
            self.data, self.targets = images.transpose(0, 2, 3, 1), labels.tolist()

    monkeypatch.setattr(torchvision_datasets, name.upper(), Downloaded)
    assert same(load_arrays(name, "test"), images, labels)


def test_a_failed_download_names_the_remedy(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision_datasets, "CIFAR10", fail)
    with pytest.raises(ConfigError, match=r"cannot be downloaded .*no route to host.*set data-path"):
        load_arrays("cifar10", "train")


# --- the cache -------------------------------------------------------------------------------------------------------
def test_processes_that_ask_at_once_build_once(folder):
    (folder / "source").write_bytes(b"x")
    arrays = random_arrays("digits", 3)
    built, together = [], threading.Barrier(4)

    def ask(_):
        together.wait()
        return cached_arrays([folder / "source"], lambda: built.append(1) or arrays)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(ask, range(4)))
    assert len(built) == 1
    assert all(same(result, *arrays) for result in results)


def test_without_locks_the_first_to_finish_is_kept(folder, monkeypatch):
    monkeypatch.setattr(array_cache, "fcntl", None)
    (folder / "source").write_bytes(b"x")
    first, second = random_arrays("digits", 3), random_arrays("digits", 3, seed=1)

    def slow():
        cached_arrays([folder / "source"], lambda: first)
        return second

    assert same(cached_arrays([folder / "source"], slow), *first)
    assert len([p for p in array_cache.cache_dir().iterdir() if p.is_dir()]) == 1


def test_a_build_that_fails_leaves_nothing(folder):
    (folder / "source").write_bytes(b"x")

    def fail():
        raise ConfigError("broken")

    with pytest.raises(ConfigError, match="broken"):
        cached_arrays([folder / "source"], fail)
    assert not [p for p in array_cache.cache_dir().iterdir() if p.is_dir()]
