"""One form for every number of seeds and devices: a mesh with the axes ("seed", "data").

Seeds are independent, so each group of them runs on its own devices (`over_seeds`); within a group the batch is
spread over the `data` axis of a global-view jit (`shard_batch`), so whoever writes a step or a rule sees the whole
batch and no collective. The program for N devices is the program for one.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxunlearn.errors import UserError

T = TypeVar("T")


def make_mesh(num_seeds: int, num_devices: int | None = None) -> jax.sharding.Mesh:
    """The mesh of `num_devices` (default: all) devices of every process of the run.

    `seed` takes gcd(seeds, devices) of them, `data` the rest. Raises UserError for more devices than there are.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second comes without a word
        raise UserError(f"JAX finds no device: check JAX_PLATFORMS ({' '.join(str(error).split())})") from error
    own = jax.local_device_count()
    if num_devices is not None and not 1 <= num_devices <= own:
        raise UserError(f"--devices {num_devices}: this machine has {own} {devices[0].platform} device(s)")
    by_process = (jax.local_devices(process)[:num_devices] for process in range(jax.process_count()))
    devices = list(itertools.chain(*by_process))
    count = len(devices)
    along_seed = math.gcd(num_seeds, count)
    shape, names, types = (along_seed, count // along_seed), ("seed", "data"), (jax.sharding.AxisType.Auto,) * 2
    if jax.process_count() > 1:  # `make_mesh` refuses GPUs of several machines
        return jax.sharding.Mesh(np.array(devices).reshape(shape), names, axis_types=types)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def over_seeds(function: Callable[..., Any], mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """`function(seeded, shared)`, written for one seed, over the leading axis of every array in `seeded`.

    Each group of devices along `seed` maps its own seeds by vmap; `shared` is one for all, so a branch on it stays
    a branch. Outputs get the seed axis in front.
    """
    return jax.shard_map(
        jax.vmap(function, in_axes=(0, None)),
        mesh=mesh,
        in_specs=(jax.P("seed"), jax.P()),
        out_specs=jax.P("seed"),
        axis_names={"seed"},
        check_vma=False,  # it rejects the layers' custom gradients; there is no collective for it to check
    )


def shard_batch(batch: T) -> T:
    """Spreads a batch, inside `over_seeds`, over the devices of the `data` axis; any batch size will do."""
    return jax.lax.with_sharding_constraint(batch, jax.P("data"))


def whole(tree: T) -> T:
    """Inside `over_seeds`: the whole of every array on each device of the `data` axis, wherever it was computed."""
    return jax.lax.with_sharding_constraint(tree, jax.P())


def place_seeds(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Puts arrays with a leading seed axis on the mesh."""
    return _place(tree, jax.sharding.NamedSharding(mesh, jax.P("seed")))


def seed_shapes(tree: Any, num_seeds: int, mesh: jax.sharding.Mesh) -> Any:
    """What `place_seeds` would make of so many seeds' trees, without the values; `tree` is one seed's."""
    sharding = jax.sharding.NamedSharding(mesh, jax.P("seed"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_seeds, *x.shape), x.dtype, sharding=sharding), tree)


def place_shared(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Puts arrays that all seeds share on every device of the mesh."""
    return _place(tree, jax.sharding.NamedSharding(mesh, jax.P()))


def _place(tree: Any, sharding: jax.sharding.NamedSharding) -> Any:
    def part_of(x: Any) -> jax.Array:
        """The array on the devices of all processes; this one gives its own devices theirs."""
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(part_of(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(part_of, tree) if sharding.mesh.is_multi_process else jax.device_put(tree, sharding)


def everywhere(tree: T, mesh: jax.sharding.Mesh) -> T:
    """Inside jit: gives every process the whole of small arrays, so that each can read them."""
    if not mesh.is_multi_process:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.sharding.NamedSharding(mesh, jax.P()))


def fetch(tree: Any) -> Any:
    """The whole arrays as numpy's, in every process; all must ask at the same point of the program."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)
