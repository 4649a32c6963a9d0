"""Training and unlearning steps, as a PyTorch user would write them from the protocol."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from jaxunlearn.benchmarks import Protocol
from jaxunlearn.torch_reference.models import initialise

Pair = tuple[Tensor, Tensor]  # images f32[B, 3, 32, 32] in channels_last, labels i64[B]


def sgd(model: nn.Module, protocol: Protocol, **options) -> torch.optim.Optimizer:
    lr, momentum, decay = protocol.pretrain_lr, protocol.pretrain_momentum, protocol.pretrain_weight_decay
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay, **options)


def adam(model: nn.Module, protocol: Protocol, **options) -> torch.optim.Optimizer:
    betas = (protocol.adam_b1, protocol.adam_b2)
    return torch.optim.Adam(model.parameters(), protocol.unlearn_lr, betas, protocol.adam_eps, **options)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def pretrain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Pair) -> Tensor:
    """One SGD step on the cross-entropy; returns the loss before it."""
    images, labels = batch
    return descend(optimizer, F.cross_entropy(model(images), labels))


def kl_divergence(targets: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), targets, reduction="batchmean")


def compiled(model: nn.Module, **options) -> nn.Module:
    """The model, in place, as `torch.compile(**options)` runs it; what is `frozen` of it too."""
    model.compile(**options)
    model.compile_options = options  # type: ignore[assignment]
    return model


def frozen(model: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(model).eval().requires_grad_(False)  # of what is compiled, a copy is not
    return compiled(teacher, **model.compile_options) if hasattr(model, "compile_options") else teacher  # type: ignore


# Each baseline is a function of the model that makes its step: (optimizer, retain, forget, epoch) -> loss.
Step = Callable[[torch.optim.Optimizer, Pair, Pair, int], Tensor]


def retain_finetune(model: nn.Module) -> Step:
    def step(optimizer, retain, forget, epoch):
        return descend(optimizer, F.cross_entropy(model(retain[0]), retain[1]))

    return step


def negative_gradient(model: nn.Module, forget_weight: float = 0.5) -> Step:
    def step(optimizer, retain, forget, epoch):
        loss = F.cross_entropy(model(retain[0]), retain[1])
        return descend(optimizer, loss - forget_weight * F.cross_entropy(model(forget[0]), forget[1]))

    return step


def bad_teacher(model: nn.Module, reset_bn: bool = False, incompetent: nn.Module | None = None) -> Step:
    competent = frozen(model)
    if incompetent is None:
        incompetent = frozen(model)
        initialise(incompetent)
        if reset_bn:
            for module in incompetent.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()

    def step(optimizer, retain, forget, epoch):
        with torch.no_grad():
            targets = torch.cat([competent(retain[0]).softmax(1), incompetent(forget[0]).softmax(1)])
        return descend(optimizer, kl_divergence(targets, model(torch.cat([retain[0], forget[0]]))))

    return step


def scrub(
    model: nn.Module, temperature: float = 4.0, gamma: float = 0.99, alpha: float = 0.01, forget_epochs: int = 2
) -> Step:
    teacher = frozen(model)

    def distance(images, logits):
        with torch.no_grad():
            targets = (teacher(images) / temperature).softmax(1)
        return temperature**2 * kl_divergence(targets, logits / temperature)

    def step(optimizer, retain, forget, epoch):
        if epoch < forget_epochs:
            descend(optimizer, -distance(forget[0], model(forget[0])))
        logits = model(retain[0])
        loss = gamma * F.cross_entropy(logits, retain[1]) + alpha * distance(retain[0], logits)
        return descend(optimizer, loss)

    return step


BASELINES = {f.__name__: f for f in (retain_finetune, negative_gradient, bad_teacher, scrub)}


@torch.no_grad()
def evaluate(model: nn.Module, test: Pair, members: Tensor, forget_class: int) -> dict[str, float]:
    """The benchmark's metrics, in eval mode; `members` are training images of the forgotten class."""
    was_training = model.training
    model.eval()
    logits, (_, labels) = model(test[0]), test
    forget = labels == forget_class
    correct = logits.argmax(1) == labels
    retain_acc, forget_acc = (correct[part].double().mean().item() for part in (~forget, forget))
    scores = torch.cat([model(members).softmax(1).amax(1), logits[forget].softmax(1).amax(1)])
    is_member = torch.arange(len(scores)) < len(members)
    auc = float(roc_auc_score(is_member.numpy(), scores.numpy()))
    model.train(was_training)
    score = (retain_acc + (1 - forget_acc) + (1 - auc)) / 3
    return {"retain_acc": retain_acc, "forget_acc": forget_acc, "forget_mia_auc": auc, "unlearn_score": score}


class Batches:
    """Batches made as the package makes them, where the images are: uint8, crop and flip in one gather, normalised."""

    def __init__(self, images: Tensor, labels: Tensor, protocol: Protocol):
        self.pad, size = protocol.crop_pixels, images.shape[1]
        mode = "constant" if protocol.crop_padding == "zero" else "reflect"
        planes = F.pad(images.permute(0, 3, 1, 2), (self.pad,) * 4, mode)  # u8[N, C, H, W]
        self.images, self.labels = planes.permute(0, 2, 3, 1).contiguous(), labels.long()
        self.device = images.device
        self.flip, self.size = protocol.flip, torch.arange(size, device=self.device)
        self.mean, self.std = (torch.tensor(v, device=self.device) for v in (protocol.mean, protocol.std))

    def __call__(self, chosen: Tensor) -> Pair:
        """The images at `chosen`, i64[B], cropped, flipped and normalised."""
        count = len(chosen)
        rows, columns = (torch.randint(2 * self.pad + 1, (count, 1), device=self.device) + self.size for _ in range(2))
        if self.flip:
            columns = torch.where(torch.rand(count, 1, device=self.device) < 0.5, columns.flip(1), columns)
        pixels = self.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        images = (pixels.float().div_(255) - self.mean).div_(self.std)
        return images.permute(0, 3, 1, 2), self.labels[chosen]
