"""PyTorch state_dict <-> variables: round trip, every bad file, and the same step as PyTorch where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.errors import UserError
from jaxunlearn.models import build
from jaxunlearn.models.torch_weights import from_state_dict, load_npz, to_state_dict


def shapes(name="resnet20", classes=10, **options):
    model = build(name, classes, **options)
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0))


def random_state(variables, seed=0):
    """A state_dict of the right names and shapes with values of its own, made without the code under test's values."""
    rng = np.random.default_rng(seed)
    empty = to_state_dict(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables))
    return {key: rng.uniform(0.5, 1.5, value.shape).astype(np.float32) / 8 for key, value in empty.items()}


@pytest.mark.parametrize("name", ["resnet20", "vgg16bn", "mobilenetv2"])
def test_round_trip(name):
    variables = shapes(name)
    state = random_state(variables)
    back = to_state_dict(from_state_dict(state, variables))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], state[key]) for key in state)


def test_names_and_layouts_are_pytorch_ones():
    state = random_state(shapes("mobilenetv2"))
    assert state["features.1.conv.0.0.weight"].shape == (32, 1, 3, 3)  # depthwise
    assert state["features.2.conv.0.0.weight"].shape == (96, 16, 1, 1)
    assert state["classifier.1.weight"].shape == (10, 1280)
    loaded = from_state_dict(state, shapes("mobilenetv2"))
    kernel = loaded["params"]["features.2.conv.0.0"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 0, 3, 7], state["features.2.conv.0.0.weight"][7, 3, 0, 0])
    np.testing.assert_array_equal(loaded["params"]["features.2.conv.0.1"]["scale"], state["features.2.conv.0.1.weight"])
    stats = loaded["batch_stats"]["features.2.conv.0.1"]
    np.testing.assert_array_equal(stats["mean"], state["features.2.conv.0.1.running_mean"])
    np.testing.assert_array_equal(stats["var"], state["features.2.conv.0.1.running_var"])


def test_file_with_half_precision_and_batch_counters(tmp_path):
    variables = shapes()
    state = random_state(variables)
    halved = {key: value.astype(np.float16) if key.endswith("weight") else value for key, value in state.items()}
    np.savez(tmp_path / "weights.npz", **halved, **{"bn1.num_batches_tracked": np.int64(7)})
    loaded = load_npz(tmp_path / "weights.npz", variables)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(loaded["params"]["linear"]["kernel"], halved["linear.weight"].T.astype(np.float32))


def test_misfits_are_listed_in_one_line(tmp_path):
    variables = shapes()
    state = random_state(variables)
    del state["conv1.weight"]
    state["fc.weight"] = np.zeros(3, np.float32)
    state["linear.weight"] = np.zeros((100, 64), np.float32)
    np.savez(tmp_path / "weights.npz", **state)
    with pytest.raises(UserError) as caught:
        load_npz(tmp_path / "weights.npz", variables)
    message = str(caught.value)
    assert "\n" not in message and "weights.npz" in message
    for part in ("missing conv1.weight", "fc.weight", "linear.weight (100, 64) instead of (10, 64)"):
        assert part in message


def test_unreadable_files_are_one_line(tmp_path):
    variables = shapes()
    state = random_state(variables)
    np.savez(tmp_path / "good.npz", **state)
    good = (tmp_path / "good.npz").read_bytes()
    flipped = bytearray(good)
    for at in range(200, len(good) // 2, 997):
        flipped[at] ^= 0xFF
    np.savez(tmp_path / "pickled.npz", **{**state, "conv1.weight": np.array([{}], dtype=object)})
    np.savez(tmp_path / "text.npz", **{**state, "bn1.weight": np.array(["a"] * 16)})
    np.save(tmp_path / "single.npy", state["conv1.weight"])
    bad = {"cut": good[: len(good) // 2], "flipped": bytes(flipped), "empty": b"", "text": b"hello"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in (*bad, "pickled.npz", "text.npz", "single.npy", "absent.npz", "."):
        with pytest.raises(UserError) as caught:
            load_npz(tmp_path / name, variables)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("train", [True, False])
def test_resnet_and_its_gradients_are_those_of_pytorch(train):
    torch = pytest.importorskip("torch")
    variables = shapes()
    state = random_state(variables)
    images = np.random.default_rng(1).normal(size=(4, 32, 32, 3)).astype(np.float32)
    tensors = {key: torch.tensor(value, requires_grad="running" not in key) for key, value in state.items()}
    conv = torch.nn.functional.conv2d

    def norm(x, name):
        t = [tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return torch.nn.functional.batch_norm(x, *t, training=train)

    x = torch.relu(norm(conv(torch.tensor(images).permute(0, 3, 1, 2), tensors["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = torch.relu(norm(conv(x, tensors[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = norm(conv(y, tensors[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                x = norm(conv(x, tensors[f"{name}.shortcut.0.weight"], stride=2), f"{name}.shortcut.1")
            x = torch.relu(x + y)
    logits = x.mean((2, 3)) @ tensors["linear.weight"].T + tensors["linear.bias"]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3, 5, 9]))
    loss.backward()

    loaded = from_state_dict(state, variables)

    @jax.jit
    def ours(params):
        model_variables = {**loaded, "params": params}
        if train:
            out, updates = build("resnet20", 10).apply(model_variables, images, train=True, mutable=["batch_stats"])
        else:
            out, updates = build("resnet20", 10).apply(model_variables, images, train=False), {}
        labels = jnp.array([0, 3, 5, 9])
        return -jax.nn.log_softmax(out)[jnp.arange(4), labels].mean(), (out, updates)

    (value, (out, updates)), gradients = jax.value_and_grad(ours, has_aux=True)(loaded["params"])
    np.testing.assert_allclose(out, logits.detach(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    mine = to_state_dict({"params": gradients, **updates})
    for key, gradient in mine.items():
        theirs = tensors[key].detach() if "running" in key else tensors[key].grad
        scale = float(theirs.abs().max())
        np.testing.assert_allclose(gradient, theirs, rtol=0, atol=2e-3 * scale, err_msg=key)
