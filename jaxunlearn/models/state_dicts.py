"""What a PyTorch state_dict holds beside the layers of a model, and what all its keys share."""

from collections.abc import Collection, Mapping

import numpy as np

from jaxunlearn.errors import UserError

NO_LAYERS = {"num_batches_tracked", "total_ops", "total_params", "n_averaged"}  # BatchNorm's, of profilers, of SWA


def layers(state: Mapping[str, np.ndarray], own: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a state_dict's layers, in its order, without a prefix that all share.

    Left out are counters and `normalisation`. What pruning keeps as `weight_orig` and `weight_mask` is multiplied.
    `own` are first parts of keys that are no such prefix, even where nothing else is there.

    Raises UserError for a quantized model.
    """
    kept = {key: value for key, value in state.items() if key.rpartition(".")[2] not in NO_LAYERS}
    for mean, std in _normalisations(kept):
        del kept[mean], kept[std]
    if any(key.rpartition(".")[2] == "zero_point" for key in kept) or any(
        value.dtype in (np.int8, np.uint8) and value.ndim > 1 for key, value in kept.items()
    ):
        raise UserError("weights are those of a quantized model: save those before quantization")
    kept = _masked(kept)
    while (
        all(key.count(".") > 1 for key in kept)
        and len(first := {key.partition(".")[0] for key in kept}) == 1
        and not first <= set(own)
    ):
        kept = {key.partition(".")[2]: value for key, value in kept.items()}
    return kept


def normalisation(state: Mapping[str, np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The mean and the standard deviation, of pixels from 0 to 1, that a model with this state_dict begins with.

    None where there is no such pair, of one value or three.
    """
    for pair in _normalisations(state):
        mean, std = (tuple(np.broadcast_to(state[key].astype(float).ravel(), 3).tolist()) for key in pair)
        return mean, std
    return None


def shortcut(state: Mapping[str, np.ndarray]) -> str:
    """ResNet-20's shortcut in a state_dict: "B" where there are 1x1 convolutions, else "A"."""
    return "B" if any(value.shape[2:] == (1, 1) for value in state.values()) else "A"


def _normalisations(state: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
    """Pairs of keys such as `normalize.mean` and `normalize.std`."""
    pairs = [(key, key[:-4] + "std") for key in state if key == "mean" or key.endswith((".mean", "_mean"))]
    return [
        (mean, std)
        for mean, std in pairs
        if std in state and all(state[key].size in (1, 3) and state[key].dtype.kind in "fiu" for key in (mean, std))
    ]


def _masked(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With `weight` in place of `weight_orig` and `weight_mask`."""
    masked = {}
    for key, value in state.items():
        whole = key.removesuffix("_orig")
        mask = state.get(whole + "_mask") if whole != key else None
        if mask is not None and mask.shape == value.shape and {mask.dtype.kind, value.dtype.kind} <= {*"fiub"}:
            with np.errstate(all="ignore"):  # what is not finite is refused later
                masked[whole] = value * mask
        elif not (key.endswith("_mask") and key.removesuffix("mask") + "orig" in state):
            masked[key] = value
    return masked
