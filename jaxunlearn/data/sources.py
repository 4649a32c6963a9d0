"""What is known about each data set before it is read: its size, its published forms and its content.

To add a data set, add a row to DATASETS, with a parser in readers.py if its format is a new one.
"""

import dataclasses
from typing import NamedTuple

from jaxunlearn.data.readers import Parser, parse_cifar10_binary, parse_cifar100_binary, parse_cifar_pickle, parse_idx


class Layout(NamedTuple):
    """One published form of a data set: where its files lie below a place that is looked in, and how to parse them.

    A split is a tuple of groups of files: each group is parsed to one ImageSet, and they are joined in this order.
    """

    folders: tuple[str, ...]
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    parse: Parser
    archive: str | None = None

    @property
    def names(self) -> list[str]:
        """Of all its files."""
        return [name for group in self.train + self.test for name in group]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known about a data set before reading it."""

    num_classes: int
    shape: tuple[int, int, int]  # height, width, channels
    train_count: int  # official
    test_count: int
    layouts: tuple[Layout, ...] = ()  # none: it comes with scikit-learn
    tfds_name: str = ""
    digests: tuple[str, ...] = ()  # of the official content, as in Dataset
    classes: tuple[str, ...] = ()  # their names, by label


_FMNIST = (
    "FashionMNIST/raw",
    "FashionMNIST",
    "fashion_mnist/raw",
    "fashion_mnist",
    "fashion-mnist",
    "",  # the place itself
)
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_FMNIST_CLASSES = "T-shirt/top,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
_BATCHES = [f"data_batch_{k}" for k in range(1, 6)]

DATASETS = {
    "cifar10": Source(
        num_classes=10,
        shape=(32, 32, 3),
        train_count=50_000,
        test_count=10_000,
        layouts=(
            Layout(
                ("cifar-10-batches-py",),
                tuple((name,) for name in _BATCHES),
                (("test_batch",),),
                parse_cifar_pickle,
                "cifar-10-python.tar.gz",
            ),
            Layout(
                ("cifar-10-batches-bin",),
                tuple((f"{name}.bin",) for name in _BATCHES),
                (("test_batch.bin",),),
                parse_cifar10_binary,
                "cifar-10-binary.tar.gz",
            ),
        ),
        tfds_name="cifar10",
        digests=("c257da322a0d649b",),
        classes=tuple(_CIFAR10.split()),
    ),
    "cifar100": Source(  # fine labels
        num_classes=100,
        shape=(32, 32, 3),
        train_count=50_000,
        test_count=10_000,
        layouts=(
            Layout(
                ("cifar-100-python",),
                (("train",),),
                (("test",),),
                parse_cifar_pickle,
                "cifar-100-python.tar.gz",
            ),
            Layout(
                ("cifar-100-binary",),
                (("train.bin",),),
                (("test.bin",),),
                parse_cifar100_binary,
                "cifar-100-binary.tar.gz",
            ),
        ),
        tfds_name="cifar100",
        digests=("c401087103404d90",),
        classes=tuple(n.replace("_", " ") for n in _CIFAR100.split()),
    ),
    "fashion_mnist": Source(
        num_classes=10,
        shape=(28, 28, 1),
        train_count=60_000,
        test_count=10_000,
        layouts=(
            Layout(
                _FMNIST,
                (("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),),
                (("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),),
                parse_idx,
            ),
        ),
        tfds_name="fashion_mnist",
        digests=("690bb3f5c635d3f3", "397f1a5d317ed3b6"),  # the second: in the order of tensorflow-datasets
        classes=tuple(_FMNIST_CLASSES.split(",")),
    ),
    "digits": Source(
        10, (8, 8, 1), train_count=1_433, test_count=364, digests=("36142473ed47490e",), classes=tuple("0123456789")
    ),
}

# Others in the same files and of the same sizes: MD5 of their test images, as an idx file.
FOREIGN = {"2646ac647ad5339dbf082846283269ea": "MNIST"}
