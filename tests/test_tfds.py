"""tensorflow-datasets for real: small data sets are prepared in its own format and read back."""

import hashlib
import io
import struct
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxunlearn.data import datasets, tfds_source
from jaxunlearn.data.readers import ImageSet
from jaxunlearn.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*where the official set has:UserWarning")


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch):
    monkeypatch.delenv("JAXUNLEARN_DATA", raising=False)


def small(shape: tuple[int, int, int], count: int = 40, classes: int = 10) -> dict[str, ImageSet]:
    rng = np.random.default_rng(0)
    return {
        split: ImageSet(rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, classes, n, np.int32))
        for split, n in (("train", count), ("test", count // 2))
    }


def png(image: np.ndarray) -> bytes:
    """tensorflow-datasets encodes arrays with TensorFlow but takes encoded images as they are."""
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes like the library's own builders: same features, same shuffle by index."""

    VERSION = tfds.core.Version("3.0.2")
    shape = (32, 32, 3)
    classes = 10
    has_id = True
    sets: dict[str, ImageSet]

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.shape),
            "label": tfds.features.ClassLabel(num_classes=self.classes),
        }
        if self.has_id:
            features["id"] = tfds.features.Text()
        if self.classes == 100:
            features["coarse_label"] = tfds.features.ClassLabel(num_classes=20)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.sets}

    def _generate_examples(self, split):
        for index, (image, label) in enumerate(zip(*self.sets[split], strict=True)):
            example = {"image": png(image), "label": int(label)}
            if self.has_id:
                example["id"] = f"{split}_{index:05d}"
            if self.classes == 100:
                example["coarse_label"] = 0
            yield index, example


class Cifar10(Small, skip_registration=True):
    sets = small((32, 32, 3))


class Cifar100(Small, skip_registration=True):
    classes = 100
    sets = small((32, 32, 3), classes=100)


class FashionMnist(Small, skip_registration=True):
    shape = (28, 28, 1)
    has_id = False
    sets = small((28, 28, 1))


def prepare(builder: type[Small], place) -> None:
    builder(data_dir=place, file_format="array_record").download_and_prepare()


@pytest.mark.parametrize("builder", [Cifar10, Cifar100])
def test_prepared_cifar_is_read_in_the_official_order(builder, tmp_path):
    prepare(builder, tmp_path)
    name = builder.name
    found = datasets.load(name, tmp_path, tmp_path / "no-cache")
    assert found.source == str(tmp_path / name / "3.0.2")
    for split, part in (("train", found.train), ("test", found.test)):
        np.testing.assert_array_equal(part.images, builder.sets[split].images)
        np.testing.assert_array_equal(part.labels, builder.sets[split].labels)
        assert part.labels.dtype == np.int32 and part.images.flags.c_contiguous


def test_prepared_fashion_mnist_is_read_in_its_shuffled_order(tmp_path):
    prepare(FashionMnist, tmp_path / "tfds")
    found = datasets.load("fashion_mnist", None, tmp_path)  # the cache
    images, labels = FashionMnist.sets["train"]
    order = [next(i for i, image in enumerate(images) if (image == one).all()) for one in found.train.images]
    # The digest that is known of this order rests on it.
    assert order == sorted(range(len(images)), key=lambda k: hashlib.md5(f"train{k}".encode()).digest())
    np.testing.assert_array_equal(found.train.labels, labels[order])
    assert datasets.load("fashion_mnist", None, tmp_path).digest == found.digest


def as_tfrecords(place, name, shards=2):
    """Makes the tfrecord files of a prepared data set in place of the others: the same examples, in another frame."""
    from array_record.python.array_record_module import ArrayRecordReader

    folder = place / name / "3.0.2"
    for split in ("train", "test"):
        (path,) = folder.glob(f"{name}-{split}.array_record*")
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        path.unlink()
        for k in range(shards):
            part = records[k * len(records) // shards : (k + 1) * len(records) // shards]
            framed = b"".join(struct.pack("<Q4x", len(record)) + record + bytes(4) for record in part)
            (folder / f"{name}-{split}.tfrecord-{k:05d}-of-{shards:05d}").write_bytes(framed)
    return folder


@pytest.mark.parametrize("builder", [Cifar10, FashionMnist])
def test_tfrecords_are_read_as_array_records_are(builder, tmp_path):
    prepare(builder, tmp_path)
    found = datasets.load(builder.name, tmp_path, tmp_path / "no-cache")
    folder = as_tfrecords(tmp_path, builder.name)
    for place in (tmp_path, folder.parent, folder, next(folder.glob("*train*"))):
        again = datasets.load(builder.name, place, tmp_path / "no-cache")
        assert again.digest == found.digest and again.source == str(folder)


def drop_a_shard(folder):
    next(folder.glob("*train.tfrecord-00001-of-00002")).unlink()


def cut_a_shard(folder):
    path = next(folder.glob("*train.tfrecord-00001-of-00002"))
    path.write_bytes(path.read_bytes()[:-6])


def spoil_a_label(folder):
    path = next(folder.glob("*train.tfrecord-00001-of-00002"))
    path.write_bytes(path.read_bytes().replace(b"label", b"libel", 1))


def test_examples_are_bounded(tmp_path, monkeypatch):
    prepare(Cifar10, tmp_path)
    monkeypatch.setattr(tfds_source, "MAX_EXAMPLES", 39)
    assert "more than 39 examples" in refused("cifar10", tmp_path, tmp_path)
    as_tfrecords(tmp_path, "cifar10")
    assert "more than 39 examples" in refused("cifar10", tmp_path, tmp_path)


@pytest.mark.parametrize("damage", [drop_a_shard, cut_a_shard, spoil_a_label])
def test_broken_tfrecords(damage, tmp_path):
    prepare(Cifar10, tmp_path)
    folder = as_tfrecords(tmp_path, "cifar10")
    damage(folder)
    assert f"{folder} cannot be read" in refused("cifar10", tmp_path, tmp_path)


def test_the_newest_finished_version_is_read(tmp_path):
    for version in ("3.0.2", "3.0.10", "incomplete.ABC_3.1.0"):
        (tmp_path / "cifar10" / version).mkdir(parents=True)
        (tmp_path / "cifar10" / version / "dataset_info.json").touch()
    (tmp_path / "cifar10" / "4.0.0").mkdir()  # nothing in it
    assert tfds_source.find_prepared(tmp_path, "cifar10") == tmp_path / "cifar10" / "3.0.10"
    assert tfds_source.find_prepared(tmp_path, "cifar100") is None


def refused(name, data_dir, cache_dir) -> str:
    with pytest.raises(UserError) as caught:
        datasets.load(name, data_dir, cache_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(folder):
    record = next(folder.glob("*train.array_record*"))
    record.write_bytes(record.read_bytes()[:1000])


def drop_records(folder):
    next(folder.glob("*test.array_record*")).unlink()


def spoil_info(folder):
    (folder / "dataset_info.json").write_text("{")


def say_riegeli(folder):
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "riegeli"))


@pytest.mark.parametrize("damage", [cut, drop_records, spoil_info, say_riegeli])
def test_broken_prepared_folders(damage, tmp_path):
    prepare(Cifar10, tmp_path)
    folder = tmp_path / "cifar10" / "3.0.2"
    damage(folder)
    message = refused("cifar10", tmp_path, tmp_path)
    assert str(folder) in message and ("nor the tfrecord format" in message) == (damage is say_riegeli)


def test_prepared_images_of_another_shape_or_class(tmp_path):
    class Wide(Small, skip_registration=True):
        name = "cifar10"
        shape = (32, 40, 3)
        sets = small((32, 40, 3), count=4)

    class Many(Small, skip_registration=True):
        name = "cifar10"
        classes = 100
        sets: ClassVar = {
            split: ImageSet(images, labels + 50) for split, (images, labels) in small((32, 32, 3), 4).items()
        }

    prepare(Wide, tmp_path / "wide")
    assert "not (32, 32, 3)" in refused("cifar10", tmp_path / "wide", tmp_path)
    prepare(Many, tmp_path / "many")
    assert "outside 0 to 9" in refused("cifar10", tmp_path / "many", tmp_path)
