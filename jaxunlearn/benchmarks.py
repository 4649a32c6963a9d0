"""The benchmarks a user can name, and the protocol: every constant of a run in one place.

The benchmark is MLS-Bench's task "security-machine-unlearning". The letter behind a field says how sure its default
is: K stated by the task or its published baselines, F deduced from published numbers, I inferred from sibling tasks
of the same family, A assumed by convention.
"""

import dataclasses
import difflib

from jaxunlearn.errors import UserError

CHOICES = {
    "epoch_length": ("min", "retain"),
    "crop_padding": ("zero", "reflect"),
    "resnet_shortcut": ("B", "A"),
    "mobilenet_stride": (1, 2),
    "pretrain_schedule": ("cosine", "constant"),
    "precision": ("fp32", "tf32", "bf16"),
}
# Fields of the protocol that have a flag of their own, and its help. `--set protocol.FIELD=VALUE` sets the others.
FLAGS = {
    "pretrain_epochs": "epochs of pretraining",
    "unlearn_epochs": "epochs of unlearning",
    "batch_size": "images a batch, over all devices",
    "train_limit": "so many training images, equally many of each class",
    "forget_class": "index of the class to forget",
    "epoch_length": "steps of an unlearning epoch: of the smaller set, or of the retain set",
    "crop_padding": "what surrounds an image before the random crop",
    "mobilenet_stride": "stride of MobileNetV2's 24-channel stage",
    "resnet_shortcut": "ResNet-20's shortcut: 1x1 convolution (B) or none (A); given weights bring their own",
    "precision": "of the computation (default: fp32, on a GPU tf32)",
}
SWITCHES = {  # further ones, that are on or off
    "validation": "hold a tenth of the training images out, and evaluate on these",
    "drop_last": "leave out partial last batches; --no-drop-last keeps them",
    "mia_augment": "score by the attack that sees the forget-train images augmented",
}
OF_ONE_MODEL = {"resnet_shortcut": "resnet20", "mobilenet_stride": "mobilenetv2", "mobilenet_dropout": "mobilenetv2"}
EVALUATIONS = ("basic", "full")  # what is computed of each model
MOST = 1_000_000  # epochs, and images a batch: steps compute with them in 32 bits
MOST_SEEDS = 10_000  # that train together
AGAINST_RETRAIN = ("resnet20-digits-class0",)  # benchmarks that retrain the reference unasked: it takes seconds
ATTEMPTS = 5  # at most, at pretraining a seed that learns nothing


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Every constant of a benchmark run but the size of its images."""

    # What is learned and what is forgotten.
    model: str
    dataset: str
    mean: tuple[float, ...]  # A  of pixels scaled to 0-1, one a channel
    std: tuple[float, ...]  # A
    forget_class: int = 0  # K
    train_limit: int | None = None  # class-balanced subset of the training images; None is all of them
    validation: bool = False  # a tenth of them, of each class the last in file order, stands in for the test images
    init_weights: str | None = None  # SHA-256 of the weights to start from in place of pretraining

    # Batches. Images are 32 x 32 (I); FashionMNIST and the digits are resized to it.
    batch_size: int = 128  # K  of every loader, over all devices
    drop_last: bool = False  # A  keep the partial last batch
    crop_pixels: int = 4  # I
    crop_padding: str = "zero"  # I  before normalisation; a sibling task reflects
    flip: bool = True  # I  FashionMNIST too
    mia_augment: bool = False  # A  the attack that scores sees clean forget-train images

    # Model variants.
    resnet_shortcut: str = "B"  # I  1x1 convolution + BatchNorm; "A" has no parameters; of given weights theirs
    mobilenet_stride: int = 1  # A  of the 24-channel stage
    mobilenet_dropout: float = 0.0  # A  before the linear layer
    precision: str = "fp32"  # of the computation, on a GPU "tf32"; parameters and statistics are always fp32

    # Pretraining: SGD, decay on all parameters (K).
    pretrain_epochs: int = 80  # K
    pretrain_lr: float = 0.1  # K
    pretrain_schedule: str = "cosine"  # I  to 0, stepped once an epoch
    pretrain_momentum: float = 0.9  # K
    pretrain_nesterov: bool = False  # A
    pretrain_weight_decay: float = 5e-4  # K

    # Unlearning: one Adam, constant learning rate, no decay (K).
    unlearn_epochs: int = 20  # K
    epoch_length: str = "min"  # F  steps an epoch: min(retain, forget) batches, or the retain batches
    unlearn_augment: bool = True  # I  retain and forget batches, as in pretraining
    unlearn_lr: float = 1e-3  # K
    adam_b1: float = 0.9  # K
    adam_b2: float = 0.999  # K
    adam_eps: float = 1e-8  # K


# The fields that decide what a pretrained model is, beside the images: they and nothing else enter its cache key.
# Batches are formed by `batch_size` and `drop_last` in pretraining too.
PRETRAIN_FIELDS = (
    "model",
    "dataset",
    "mean",
    "std",
    "train_limit",
    "validation",
    "batch_size",
    "drop_last",
    "crop_pixels",
    "crop_padding",
    "flip",
    "resnet_shortcut",
    "mobilenet_stride",
    "mobilenet_dropout",
    "precision",
    "pretrain_epochs",
    "pretrain_lr",
    "pretrain_schedule",
    "pretrain_momentum",
    "pretrain_nesterov",
    "pretrain_weight_decay",
)

BENCHMARKS = {
    "resnet20-cifar10-class0": Protocol(
        model="resnet20", dataset="cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    ),
    "vgg16bn-cifar100-class0": Protocol(
        model="vgg16bn", dataset="cifar100", mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)
    ),
    "mobilenetv2-fmnist-class0": Protocol(
        model="mobilenetv2", dataset="fashion_mnist", mean=(0.2860,) * 3, std=(0.3530,) * 3
    ),
    # Ours, and nobody's published rows: a benchmark is one line.
    "vgg16bn-cifar10-class0": Protocol("vgg16bn", "cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    # Ours too: the whole pipeline in a minute, nothing to download.
    "resnet20-digits-class0": Protocol(
        model="resnet20",
        dataset="digits",
        mean=(0.3057,) * 3,
        std=(0.3237,) * 3,
        flip=False,
        batch_size=32,
        drop_last=True,  # one batch size, so half the programs to compile
        pretrain_epochs=5,
        unlearn_epochs=10,
    ),
}


def get_benchmark(name: str) -> Protocol:
    """The protocol of a benchmark. Raises UserError, with the nearest name, for one that does not exist."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]

    # Part by part: as wholes, names of longer data sets are unlike what is cut short.
    def likeness(known: str) -> float:
        return sum(
            max(difflib.SequenceMatcher(None, part, other).ratio() for other in known.split("-"))
            for part in name.split("-")
        )

    nearest = max(BENCHMARKS, key=likeness)
    raise UserError(f"unknown benchmark '{name}': did you mean '{nearest}'? (bench --list shows all)")


def validate(protocol: Protocol, num_classes: int) -> None:
    """Raises UserError for the first value of `protocol` that no run can have."""
    for name, allowed in CHOICES.items():
        if (value := getattr(protocol, name)) not in allowed:
            raise UserError(f"{name} is {value!r}: choose from {', '.join(map(str, allowed))}")
    for name in ("pretrain_epochs", "unlearn_epochs", "batch_size"):
        if not 1 <= (value := getattr(protocol, name)) <= MOST:
            raise UserError(f"{name} is {value}: it must be at least 1 and at most {MOST:,}")
    for name in ("pretrain_lr", "unlearn_lr", "adam_eps"):
        if not 0 < (value := getattr(protocol, name)) < float("inf"):
            raise UserError(f"{name} is {value}: it must be a positive number")
    for name in ("pretrain_momentum", "mobilenet_dropout", "adam_b1", "adam_b2"):
        if not 0 <= (value := getattr(protocol, name)) < 1:
            raise UserError(f"{name} is {value}: it must be at least 0 and less than 1")
    if not 0 <= protocol.pretrain_weight_decay < float("inf"):
        raise UserError(f"pretrain_weight_decay is {protocol.pretrain_weight_decay}: it must be 0 or more")
    if not 0 <= protocol.crop_pixels < 32:
        raise UserError(f"crop_pixels is {protocol.crop_pixels}: it must be from 0 to 31")
    if not 0 <= protocol.forget_class < num_classes:
        raise UserError(
            f"forget class {protocol.forget_class} does not exist: {protocol.dataset} has 0 to {num_classes - 1}"
        )
    for name, model in OF_ONE_MODEL.items():
        default = getattr(Protocol, name)
        if protocol.model != model and (value := getattr(protocol, name)) != default:
            raise UserError(f"{name} is {value!r}: {protocol.model} has none, it is {model}'s alone")
    if not isinstance(protocol.train_limit, int | None):
        raise UserError(f"train_limit is {protocol.train_limit!r}: it must be a whole number")
    if protocol.train_limit is not None and protocol.train_limit < num_classes:
        raise UserError(
            f"train_limit is {protocol.train_limit}: {protocol.dataset} needs at least {num_classes}, one image a class"
        )
    if protocol.validation and protocol.init_weights is not None:
        raise UserError("validation: given weights may have seen the images that stand in for the test images")
    if len(protocol.mean) != 3 or len(protocol.std) != 3 or min(protocol.std) <= 0:
        raise UserError("mean and std need three values each, one a channel, and std must be positive")
