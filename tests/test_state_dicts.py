"""What stands beside the layers of a state_dict, and before their names."""

import numpy as np
import pytest

from jaxunlearn.errors import UserError
from jaxunlearn.models.state_dicts import layers, normalisation, shortcut

CONV, NORM = np.arange(12.0).reshape(2, 6, 1, 1), np.ones(2)
STATE = {"a.conv.weight": CONV, "a.bn.running_mean": NORM, "fc.weight": np.ones((3, 2))}


def assert_same(found, expected):
    assert [*found] == [*expected]
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "net.encoder.", "1."])
def test_what_is_no_layer_is_left_out_and_what_all_share_stripped(prefix):
    state = {prefix + key: value for key, value in STATE.items()}
    state |= {f"{prefix}a.bn.num_batches_tracked": np.int64(3), "n_averaged": np.int64(9)}
    state |= {"total_ops": np.zeros(1), f"{prefix}a.conv.total_params": np.zeros(1)}
    state |= {"0.mean": np.zeros(3), "0.std": np.ones((1, 3, 1, 1))}
    assert_same(layers(state), STATE)


def test_names_keep_their_last_two_parts_and_the_models_own():
    assert [*layers({"conv.weight": CONV, "conv.bias": NORM})] == ["conv.weight", "conv.bias"]
    headless = {"features.0.weight": CONV, "features.1.bias": NORM}
    assert_same(layers({"module." + key: value for key, value in headless.items()}, own=["features"]), headless)


def test_pruned_weights_are_multiplied_by_their_masks():
    mask = (CONV % 2).astype(np.float32)
    state = {"a.conv.weight_orig": CONV, "a.conv.weight_mask": mask, "a.conv.bias": NORM, "b_mask": NORM}
    assert_same(layers(state), {"a.conv.weight": CONV * mask, "a.conv.bias": NORM, "b_mask": NORM})
    assert layers({"a_orig": CONV, "a_mask": NORM}).keys() == {"a_orig"}  # of another shape


@pytest.mark.parametrize(
    "beside", [{"fc.zero_point": np.zeros(())}, {"fc.weight": np.zeros((3, 2), np.int8)}], ids=["scaled", "int8"]
)
def test_a_quantized_model_is_refused(beside):
    with pytest.raises(UserError, match="quantized"):
        layers(STATE | beside)


@pytest.mark.parametrize(
    ("keys", "shape"),
    [(("mean", "std"), (3,)), (("normalize.mean", "normalize.std"), (3, 1, 1)), (("pixel_mean", "pixel_std"), (1,))],
)
def test_the_mean_and_deviation_that_a_model_begins_with_are_found(keys, shape):
    state = STATE | {keys[0]: np.full(shape, 0.5), keys[1]: np.full(shape, 0.25)}
    assert normalisation(state) == ((0.5,) * 3, (0.25,) * 3)


def test_running_statistics_are_no_normalisation():
    assert normalisation(STATE) is None
    assert normalisation({"a.running_mean": np.ones(3), "a.running_var": np.ones(3), "a.mean": NORM}) is None


def test_the_shortcut_is_seen_by_its_convolutions():
    assert shortcut(STATE) == "B"
    assert shortcut({"a.weight": np.ones((2, 2, 3, 3)), "fc.weight": np.ones((3, 2))}) == "A"
