import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import (
    CLASSES,
    COUNT,
    PLAIN,
    PROTOCOL,
    assert_close,
    assert_differ,
    counted_reads,
    make_images,
    mesh_of,
    pretrain,
    pretraining_of,
    run_epochs,
    seed_of,
    to_rounding,
)

from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.data.batches import epoch_order, normalise
from jaxunlearn.devices.sharding import place_seeds
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import Stream, stream_key
from jaxunlearn.training import loop
from jaxunlearn.training.history import Position
from jaxunlearn.training.pretraining import make_optimizer

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
SEEDS = (1, 2, 3)
EPOCHS = PROTOCOL.pretrain_epochs


class TorchSGD:
    """torch.optim.SGD(lr, momentum, weight_decay, nesterov) on a tree of arrays, the rate given with each step."""

    def __init__(self, momentum, weight_decay, nesterov=False):
        self.momentum, self.weight_decay, self.nesterov, self.buffer = momentum, weight_decay, nesterov, None

    def step(self, params, gradients, rate):
        decayed = jax.tree.map(lambda g, p: np.asarray(g) + self.weight_decay * p, gradients, params)
        first = self.buffer is None
        self.buffer = decayed if first else jax.tree.map(lambda b, d: self.momentum * b + d, self.buffer, decayed)
        ahead = jax.tree.map(lambda d, b: d + self.momentum * b, decayed, self.buffer)
        return jax.tree.map(lambda p, b: p - rate * b, params, ahead if self.nesterov else self.buffer)


def cosine(rate, epoch, epochs):
    return rate * (1 + np.cos(np.pi * epoch / epochs)) / 2


@pytest.mark.parametrize("epoch", [0, 1, 40, 79])
def test_learning_rate_is_constant_within_an_epoch_and_cosine_over_epochs(epoch):
    optimizer = make_optimizer(get_benchmark("resnet20-cifar10-class0"), steps_per_epoch=7)
    fresh = optimizer.init(jnp.zeros(()))
    for count in (7 * epoch, 7 * epoch + 6):
        state = optax.tree_utils.tree_set(fresh, count=jnp.int32(count))
        update, _ = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        np.testing.assert_allclose(-update, cosine(0.1, epoch, 80), atol=1e-8)  # 1 + cos in fp32 near the end


def test_a_constant_learning_rate_stays():
    protocol = dataclasses.replace(PROTOCOL, pretrain_schedule="constant", pretrain_weight_decay=0.0)
    optimizer = make_optimizer(protocol, steps_per_epoch=1)
    state = optimizer.init(jnp.zeros(()))
    for count in range(3):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        np.testing.assert_allclose(-update, 0.1 * sum(0.9**k for k in range(count + 1)), rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_optimizer_is_torchs_sgd(nesterov):
    protocol = dataclasses.replace(PROTOCOL, pretrain_weight_decay=0.3, pretrain_epochs=4, pretrain_nesterov=nesterov)
    rng = np.random.default_rng(0)
    gradients = [{"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)} for _ in range(8)]
    with jax.enable_x64(True):
        optimizer, torch = make_optimizer(protocol, steps_per_epoch=2), TorchSGD(0.9, 0.3, nesterov)
        params = expected = {"w": rng.normal(size=(3, 2)), "b": np.ones(2)}
        state = optimizer.init(params)
        for count, gradient in enumerate(gradients):
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            expected = torch.step(expected, gradient, cosine(0.1, count // 2, 4))
            assert_close(params, expected, 1e-12)


def test_epochs_are_what_a_plain_loop_computes_scanned_or_dispatched(monkeypatch):
    """Order, partial last batch with its own BatchNorm statistics, learning rate, loss and accuracy."""
    protocol = dataclasses.replace(PROTOCOL, model=PLAIN, batch_size=22, crop_pixels=0, flip=False, precision="fp64")
    data, network, torch = make_images(), make_network(protocol, CLASSES), TorchSGD(0.9, 5e-4)

    @jax.jit
    def gradients(params, stats, images, labels):
        def loss(params):
            logits, moved = network.apply_train(params, stats, images, jax.random.key(0))
            return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean(), (logits, moved)

        return jax.value_and_grad(loss, has_aux=True)(params)

    with jax.enable_x64(True), jax.set_mesh(mesh_of()):
        results = []
        for scanned in (False, True):
            monkeypatch.setattr(loop, "scans", lambda scanned=scanned: scanned)
            run, keys = pretraining_of.__wrapped__(protocol, (5,), mesh_of())
            start = jax.device_get(run.start(keys))
            results.append(run_epochs(run, place_seeds(start, mesh_of()), keys, 2))
            assert run.images_per_epoch == COUNT and run.steps_per_epoch == 3

        params, stats = jax.tree.map(lambda x: x[0], start[:2])
        losses, accuracies = [], []
        for epoch in range(2):
            order_key = stream_key(keys[0], Stream.PRETRAIN_ORDER, epoch)
            order = np.asarray(epoch_order(order_key, jnp.arange(COUNT, dtype=np.int32)))[0]
            for chosen in np.split(order, [22, 44]):
                labels, images = data.labels[chosen], normalise(jnp.asarray(data.images[chosen]), protocol)
                (loss, (logits, stats)), gradient = gradients(params, stats, images, labels)
                params = torch.step(params, gradient, cosine(0.1, epoch, protocol.pretrain_epochs))
                losses.append(loss)
                accuracies.append((np.asarray(logits).argmax(-1) == labels).mean())
    for state, metrics in results:
        assert_close(jax.tree.map(lambda x: x[0], state[:2]), (params, jax.device_get(stats)), 1e-9)
        np.testing.assert_allclose(metrics["loss"], [losses], rtol=1e-9)
        np.testing.assert_allclose(metrics["accuracy"], [accuracies], rtol=1e-6)


@pytest.fixture(scope="module")
def trained(tiny_models):
    """The pretraining of three seeds, its keys, and what came out."""
    with jax.set_mesh(mesh_of()):
        run, keys = pretraining_of(PROTOCOL, SEEDS, mesh_of())
        return run, keys, *run_epochs(run, run.start(keys), keys, EPOCHS)


def test_training_learns(trained):
    *_, metrics = trained
    assert (metrics["loss"][:, -1] < 0.8 * metrics["loss"][:, 0]).all()
    assert (metrics["accuracy"][:, -1] > 0.6).all()


def test_training_is_deterministic_and_can_be_resumed(trained):
    run, keys, expected, metrics = trained
    with jax.set_mesh(mesh_of()):
        half, first = run_epochs(run, run.start(keys), keys, EPOCHS // 2)
        resumed, second = run_epochs(run, half, keys, EPOCHS, first=EPOCHS // 2)
    assert_close(resumed, expected, 0)
    np.testing.assert_array_equal(np.concatenate([first["loss"], second["loss"]], 1), metrics["loss"])


def test_seeds_differ_from_the_first_weights_on(trained):
    run, keys, state, _ = trained
    with jax.set_mesh(mesh_of()):
        start = run.start(keys)
    for one, other in ((0, 1), (1, 2)):
        assert_differ(seed_of(start.params["conv"], one), seed_of(start.params["conv"], other))
        assert_differ(seed_of(state.batch_stats, one), seed_of(state.batch_stats, other))


def test_abstract_is_one_seeds_state(trained):
    run, _, state, _ = trained
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
    assert run.abstract(Position(0, 0)) == one


def test_an_epoch_of_training_fetches_once(trained):
    run, keys, *_ = trained
    with jax.set_mesh(mesh_of()):
        state = run.start(keys)
        with counted_reads() as counts:
            run.epoch(state, keys, 1)
    assert counts == {"device_get": 1, "other": 0}


@to_rounding
def test_seeds_together_are_each_seed_alone(protocol, epochs, rtol):
    together = pretrain(protocol, SEEDS, epochs, mesh_of())
    assert_close(seed_of(together, 1), pretrain(protocol, SEEDS[1:2], epochs, mesh_of()), rtol)


@pytest.mark.parametrize("split", [(1, 2), (3, 1), (1, 4)])
@to_rounding
def test_devices_agree(protocol, epochs, rtol, split):
    assert_close(pretrain(protocol, SEEDS, epochs, mesh_of(*split)), pretrain(protocol, SEEDS, epochs, mesh_of()), rtol)
