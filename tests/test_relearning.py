"""How fast a class is relearned: what is only hidden as if it were not, what was learned sooner than what never was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, PROTOCOL, assert_close, host_models, make_images, make_split, mesh_of, pretrain, seed_of

from jaxunlearn.data.batches import normalise
from jaxunlearn.devices.sharding import place_seeds
from jaxunlearn.evaluation import relearning
from jaxunlearn.evaluation.relearning import HEAD, STEPS, Relearning
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import Stream, seed_keys, stream_key
from jaxunlearn.training.loop import Timing

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]
SMALL = dataclasses.replace(PROTOCOL, batch_size=8)  # 19 images to relearn are no whole number of batches
TEST, FORGET = make_images(200, seed=1), SMALL.forget_class
SEEDS = (4, 8)  # whose fresh heads do not happen to answer only the forgotten class


@functools.cache
def relearning_of(mesh, count):
    """Made once for all tests of so many seeds, which it is compiled for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relearning, "BLOCK", 30)  # 67 images are asked: three blocks, the last not full
        network, forget = make_network(SMALL, CLASSES), make_split().forget
        return Relearning(network, SMALL, make_images(), forget, TEST, mesh, Timing())


@functools.cache
def trained():
    """Models that know all classes: (params, batch_stats)."""
    state, _ = pretrain(dataclasses.replace(PROTOCOL, batch_size=19), SEEDS, 8, mesh_of())
    return state.params, state.batch_stats


def with_bias(models, value):
    """The models with another bias of the forgotten class."""
    params, batch_stats = models
    head = params["linear"] | {"bias": np.array(params["linear"]["bias"])}
    head["bias"][:, FORGET] = value
    return params | {"linear": head}, batch_stats


def curves(models, seeds=SEEDS, split=(1, 1)):
    mesh = mesh_of(*split)
    with jax.set_mesh(mesh):
        return relearning_of(mesh, len(seeds)).curves(*place_seeds(models, mesh), seed_keys(seeds))


def test_an_output_mask_relearns_to_the_bit_as_the_model_behind_it():
    untouched = curves(trained())
    assert (untouched.shape, untouched.dtype) == ((2, STEPS + 1), np.float32)
    assert all(len(np.unique(curve)) > 2 for curve in untouched)
    np.testing.assert_array_equal(curves(with_bias(trained(), -np.inf)), untouched)


def test_what_was_learned_is_relearned_sooner_than_what_never_was():
    fresh = jax.tree.map(lambda *x: np.stack(x), *(host_models(PROTOCOL, seed) for seed in SEEDS))
    assert (curves(trained())[:, 1:].mean(1) > curves(fresh)[:, 1:].mean(1) + 0.1).all()


def test_before_the_first_step_only_the_classs_head_is_another():
    network, asked, i = make_network(SMALL, CLASSES), TEST.labels == FORGET, 1
    assert asked.sum() == 67
    params, batch_stats = jax.tree.map(lambda x: x[i], trained())
    fresh, _ = jax.jit(network.initialise)(stream_key(seed_keys(SEEDS)[i], Stream.RELEARN, HEAD))
    kernel = params["linear"]["kernel"].copy()
    kernel[:, FORGET] = fresh["linear"]["kernel"][:, FORGET]
    head = {"linear": {"kernel": kernel, "bias": params["linear"]["bias"] * (np.arange(CLASSES) != FORGET)}}
    images = normalise(jnp.asarray(TEST.images[asked]), SMALL)
    answers = jax.jit(network.apply_eval)(params | head, batch_stats, images).argmax(-1)
    expected = float((answers == FORGET).mean())
    assert 0 < expected < 1
    assert curves(trained())[i, 0] == pytest.approx(expected, abs=1e-6)


def test_it_learns_from_the_classs_training_images_alone_each_once_a_pass():
    run, models = relearning_of(mesh_of(), 2), place_seeds(trained(), mesh_of())
    with jax.set_mesh(mesh_of()):
        carry, (_, orders) = run._begin((*models, place_seeds(seed_keys(SEEDS), mesh_of())), run._forget)
    assert_close((carry.params["conv"], carry.batch_stats), (models[0]["conv"], models[1]), 0)
    assert orders.shape[1] >= (STEPS + 1) * SMALL.batch_size
    passes = np.asarray(orders).reshape(-1, 19)
    np.testing.assert_array_equal(np.sort(passes), np.tile(make_split().forget, (len(passes), 1)))
    assert len(np.unique(passes, axis=0)) == len(passes)


def test_a_model_that_is_not_finite_answers_nothing_right_and_harms_no_other():
    params, batch_stats = trained()
    broken = jax.tree.map(lambda x: np.stack([x[0], np.full_like(x[1], np.nan)]), params)
    found = curves((broken, batch_stats))
    np.testing.assert_array_equal(found[0], curves(trained())[0])
    assert (found[1] == 0).all()


def test_seeds_together_are_each_seed_alone():
    alone = curves(seed_of(trained(), 1), SEEDS[1:])
    np.testing.assert_allclose(alone[0], curves(trained())[1], atol=1.5 / 67)  # of 67 images one may be on the edge


def test_devices_agree_on_what_was_compiled_ahead():
    mesh = mesh_of(2, 2)
    with jax.set_mesh(mesh):
        relearning_of(mesh, 2).compile(2)
    np.testing.assert_allclose(curves(trained(), split=(2, 2)), curves(trained()), atol=1.5 / 67)
    assert "compile_s" not in relearning_of(mesh, 2)._loop._timing
