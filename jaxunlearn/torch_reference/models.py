"""The three networks as `torch.nn.Module`s. Their parameters have the names that the package's have."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jaxunlearn.models.mobilenet import stages
from jaxunlearn.models.vgg import BLOCKS


def conv(inputs: int, features: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, features, size, stride, size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, stride=stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - inputs) // 2
        self.shortcut = nn.Sequential()
        if shortcut == "B" and inputs != channels:
            self.shortcut = nn.Sequential(conv(inputs, channels, 1, stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if len(self.shortcut) or not self.pad:
            return F.relu(y + self.shortcut(x), inplace=True)
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad)))


class ResNet20(nn.Module):
    def __init__(self, num_classes: int, shortcut: str = "B"):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16), nn.BatchNorm2d(16)
        inputs = 16
        for stage, channels in enumerate((16, 32, 64), start=1):
            blocks = []
            for block in range(3):
                blocks.append(BasicBlock(inputs, channels, 2 if stage > 1 and block == 0 else 1, shortcut))
                inputs = channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


class VGG16BN(nn.Module):
    def __init__(self, num_classes: int, dropout: float = 0.5):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for block in BLOCKS:
            for features in block:
                layers += [conv(inputs, features), nn.BatchNorm2d(features), nn.ReLU(inplace=True)]
                inputs = features
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        head = [nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(512, num_classes)]
        self.classifier = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def conv_bn(inputs: int, features: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layers = [conv(inputs, features, size, stride, groups), nn.BatchNorm2d(features), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int, expansion: int):
        super().__init__()
        width = expansion * inputs
        expand = [conv_bn(inputs, width, 1)] if expansion != 1 else []
        depthwise = conv_bn(width, width, stride=stride, groups=width)
        self.conv = nn.Sequential(*expand, depthwise, conv(width, channels, 1), nn.BatchNorm2d(channels))
        self.residual = stride == 1 and inputs == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, num_classes: int, stride: int = 1):
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32)]
        inputs = 32
        for expansion, channels, blocks, first_stride in stages(stride):
            for block in range(blocks):
                layers.append(InvertedResidual(inputs, channels, first_stride if block == 0 else 1, expansion))
                inputs = channels
        self.features = nn.Sequential(*layers, conv_bn(inputs, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def build(protocol, num_classes: int, *, dropout: float = 0.5) -> nn.Module:
    """The network that a `jaxunlearn.benchmarks.Protocol` names, initialised as it says."""
    model = {
        "resnet20": lambda: ResNet20(num_classes, protocol.resnet_shortcut),
        "vgg16bn": lambda: VGG16BN(num_classes, dropout),
        "mobilenetv2": lambda: MobileNetV2(num_classes, protocol.mobilenet_stride),
    }[protocol.model]()
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Kaiming normal with ReLU's gain: fan_out for convolutions, fan_in for linear layers; the rest constant."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class Depthwise(torch.nn.Conv2d):
    """A depthwise 3x3 convolution as nine products: PyTorch's own takes the channels one by one in float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, stride = *x.shape[2:], self.stride[0]
        x, taps = F.pad(x, (1, 1, 1, 1)), self.weight[:, 0, :, :, None, None]
        parts = (
            x[:, :, i : i + height : stride, j : j + width : stride] * taps[:, i, j] for i in range(3) for j in range(3)
        )
        return sum(parts, start=torch.zeros((), dtype=x.dtype))


def use_depthwise_products(model: torch.nn.Module) -> None:
    """Makes every depthwise convolution of `model` a `Depthwise`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.__class__ = Depthwise
