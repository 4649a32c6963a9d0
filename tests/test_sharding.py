import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CLASSES, PROTOCOL, assert_close, make_batch, make_models, mesh_of

from jaxunlearn.devices.sharding import make_mesh, over_seeds, place_seeds, place_shared, shard_batch
from jaxunlearn.errors import UserError
from jaxunlearn.models.network import make_network
from jaxunlearn.randomness import Stream, seed_keys, stream_key
from jaxunlearn.registry import build_rule, get_method
from jaxunlearn.training.unlearning import make_context


@pytest.mark.parametrize(
    ("seeds", "devices", "split"),
    [(1, 1, (1, 1)), (1, 4, (1, 4)), (2, 4, (2, 2)), (4, 4, (4, 1)), (8, 4, (4, 1)), (3, 4, (1, 4)), (6, 4, (2, 2)),
     (3, 3, (3, 1)), (2, 3, (1, 3)), (4, 2, (2, 1)), (2, None, (2, 2))],
)  # fmt: skip
def test_seeds_take_the_greatest_common_divisor_of_the_devices(seeds, devices, split):
    mesh = make_mesh(seeds, devices)
    assert mesh.axis_names == ("seed", "data")
    assert mesh.devices.shape == split


@pytest.mark.parametrize("devices", [0, 5])
def test_a_number_of_devices_that_there_is_not_is_refused(devices):
    with pytest.raises(UserError, match=rf"--devices {devices}: this machine has 4 cpu device\(s\)"):
        make_mesh(1, devices)


@pytest.mark.parametrize("split", [(1, 1), (2, 2), (4, 1), (1, 4)])
def test_over_seeds_maps_seeds_and_shares_the_rest(split):
    mesh = mesh_of(*split)
    seeded, shared = jnp.arange(20.0).reshape(4, 5), jnp.arange(5.0)

    def function(own, common):
        return {"sum": (shard_batch(own) * common).sum(), "own": own}

    with jax.set_mesh(mesh):
        result = jax.jit(over_seeds(function, mesh))(place_seeds(seeded, mesh), place_shared(shared, mesh))
    np.testing.assert_array_equal(result["sum"], (seeded * shared).sum(1))
    np.testing.assert_array_equal(result["own"], seeded)
    assert len({shard.index[0].start for shard in result["own"].addressable_shards}) == split[0]


@pytest.mark.parametrize("split", [(1, 1), (2, 2)])
def test_a_branch_on_what_seeds_share_stays_a_branch(split):
    def function(own, common):
        values, own_epoch = own
        epoch = common if branch_on_shared else own_epoch
        return jax.lax.cond(epoch < 2, jnp.sin, jnp.cos, values)

    mesh = mesh_of(*split)
    for branch_on_shared in (True, False):
        with jax.set_mesh(mesh):
            arguments = (jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)), jnp.zeros((), jnp.int32)
            program = str(jax.make_jaxpr(over_seeds(function, mesh))(*arguments))
        assert ("cond[" in program) == branch_on_shared
        assert ("select_n" in program) != branch_on_shared


def test_random_numbers_depend_on_seed_stream_and_path():
    keys = [
        stream_key(seed, stream, *path)
        for seed in seed_keys([0, 1, 2**32 - 1])
        for stream in (Stream.PRETRAIN, Stream.UNLEARN)
        for path in ((), (0,), (1,), (0, 1), (1, 0))
    ]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys)


def test_a_seed_means_the_same_numbers_whichever_generator_jax_is_set_to():
    seeds = [0, 2**32 - 1]
    expected = jax.random.key_data(seed_keys(seeds))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.key_data(seed_keys(seeds)), expected)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap_over_groups_of_seeds_is_the_mesh(tiny_models):
    """`jax.pmap` of the seed-vmapped step, each device with its group of seeds: the older form of the same program."""
    context = make_context(make_network(PROTOCOL, CLASSES), PROTOCOL, CLASSES, 1)
    rule = build_rule(get_method("retain_finetune"), context)
    seeds, epoch = [1, 2, 3, 4], np.int32(0)
    batches = [jax.tree.map(lambda *x: jnp.stack(x), *(make_batch(9, 10 * k + s) for s in range(4))) for k in (0, 1)]
    seeded = jax.device_get((*make_models(PROTOCOL, seeds, mesh_of()), jax.random.key_data(seed_keys(seeds)), *batches))

    def step(own, epoch):
        params, batch_stats, key, retain, forget = own
        state = rule.init(params, batch_stats, jax.random.wrap_key_data(key))._replace(step=epoch, epoch=epoch)
        params, state, metrics = rule.step(params, state, retain, forget)
        return params, state.batch_stats, state.opt_state, metrics

    mesh = mesh_of(2, 1)
    with jax.set_mesh(mesh):
        expected = jax.jit(over_seeds(step, mesh))(place_seeds(seeded, mesh), place_shared(epoch, mesh))
    groups = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), seeded)
    over_groups = jax.pmap(jax.vmap(step, in_axes=(0, None)), in_axes=(0, None), devices=jax.devices()[:2])
    result = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), jax.device_get(over_groups(groups, epoch)))
    assert_close(result, jax.device_get(expected), 1e-5)
