"""A network of three layers on 2x2 images, the same in JAX and in NumPy, and what a rule's step must do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn.data.batches import Batch
from jaxunlearn.methods.rule import Context
from jaxunlearn.registry import build_rule, get_method

CLASSES, WIDTH = 4, 3
LAYERS = ("conv1", "bn1", "conv2", "bn2", "linear")  # in the order in which they compute
RATE = 0.5  # of plain descent: a step shows the gradient
MEAN, STD = (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)


def network(params, stats, images, train, xp=np):
    """Logits f[B, CLASSES] and the statistics afterwards; BatchNorm only centres."""
    h, after = images.reshape(len(images), -1), {}
    for number in "12":
        h = h @ params["conv" + number]["kernel"]
        batch_norm, mean = params["bn" + number], stats["bn" + number]["mean"]
        after["bn" + number] = {"mean": 0.9 * mean + 0.1 * h.mean(0) if train else mean}
        h = xp.tanh((h - (h.mean(0) if train else mean)) * batch_norm["scale"] + batch_norm["bias"])
    return h @ params["linear"]["kernel"] + params["linear"]["bias"], after


def model(seed):
    """(params, stats) in float64 whose values float32 has."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32).astype(np.float64)

    params = {"linear": {"kernel": draw(WIDTH, CLASSES), "bias": draw(CLASSES)}}
    for number, inputs in (("1", 12), ("2", WIDTH)):
        params["conv" + number] = {"kernel": draw(inputs, WIDTH, scale=inputs**-0.5)}
        params["bn" + number] = {"scale": 1 + draw(WIDTH, scale=0.1), "bias": draw(WIDTH, scale=0.1)}
    return params, {"bn" + number: {"mean": draw(WIDTH, scale=0.1)} for number in "12"}


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


STUDENT, TEACHER, FRESH = map(model, range(3))  # the model that learns, the one before the first step, a random one


def batch(count, seed, labels=None):
    """Normalised images of whole pixels, in float64; `labels` are any, or one for all."""
    rng = np.random.default_rng(seed)
    images = (rng.integers(0, 256, (count, 2, 2, 3)) / 255 - MEAN) / STD
    labels = rng.integers(0, CLASSES, count) if labels is None else np.full(count, labels)
    return Batch(images.astype(np.float32), labels.astype(np.int32), rng.permutation(100)[:count].astype(np.int32))


RETAIN, FORGET = batch(6, 10), batch(5, 11)


def context(**fields):
    def apply_train(params, stats, images, key):
        return network(params, stats, images, True, jnp)

    def apply_eval(params, stats, images):
        return network(params, stats, images, False, jnp)[0]

    return Context(
        **{
            "apply_train": apply_train,
            "apply_eval": apply_eval,
            "initialise": lambda key: single(FRESH),
            "forward": None,
            "layers": lambda: LAYERS,
            "optimizer": optax.sgd(RATE),
            "learning_rate": RATE,
            "eps": 1e-8,
            "mean": MEAN,
            "std": STD,
            "num_classes": CLASSES,
            "forget_class": 0,
            "steps_per_epoch": 2,
            "epochs": 8,
        }
        | fields
    )


def rule_of(name, **settings):
    return build_rule(get_method(name, settings), context())


def start(rule, epoch=0):
    """The state before the first step of a rule that starts from the teacher."""
    return rule.init(*single(TEACHER), jax.random.key(3))._replace(epoch=jnp.int32(epoch))


def stepped(name, retain=RETAIN, forget=FORGET, epoch=0, **settings):
    """(params, state, metrics) of one step of the student."""
    rule = rule_of(name, **settings)
    retain, forget = (jax.tree.map(jnp.asarray, batch) for batch in (retain, forget))
    return jax.jit(rule.step)(single(STUDENT[0]), start(rule, epoch), retain, forget)


def student(params, *batches):
    """Logits of each batch's images in train mode, in turn, and the statistics after the last."""
    stats, logits = TEACHER[1], []
    for each in batches:
        of_one, stats = network(params, stats, np.asarray(each.images, np.float64), True)
        logits.append(of_one)
    return logits, stats


def teacher(images):
    return network(*TEACHER, np.asarray(images, np.float64), False)[0]


def slope(loss, params):
    """The gradient of `loss(params)`, a float, in float64, by differences."""
    leaves, structure = jax.tree.flatten(params)

    def difference(index, place, by=1e-5):
        moved = [[leaf.copy() for leaf in leaves] for _ in range(2)]
        for way, sign in zip(moved, (1, -1), strict=True):
            way[index][place] += sign * by
        up, down = (loss(jax.tree.unflatten(structure, way)) for way in moved)
        return (up - down) / (2 * by)

    gradients = [
        np.array([difference(index, place) for place in np.ndindex(leaf.shape)]).reshape(leaf.shape)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, gradients)


def assert_steps_down(result, loss, learning=LAYERS):
    """Metrics say `loss(params)`, and the step is one of plain descent down it, in the layers that learn alone."""
    params, _, metrics = result
    np.testing.assert_allclose(metrics["loss"], loss(STUDENT[0]), rtol=1e-5, atol=1e-6)
    gradients = slope(loss, STUDENT[0])
    for name, layer in STUDENT[0].items():
        for part, before in layer.items():
            expected = before - RATE * gradients[name][part] * (name in learning)
            np.testing.assert_allclose(params[name][part], expected, rtol=1e-5, atol=2e-6, err_msg=f"{name} {part}")
