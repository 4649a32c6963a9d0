"""What "fp32", "tf32" and "bf16" mean on which platform, without one of the others at hand."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from tiny import CLASSES, PLAIN, PROTOCOL, make_batch

from jaxunlearn import benchmarks
from jaxunlearn.benchmarks import get_benchmark
from jaxunlearn.devices.configuration import computing, default_precision
from jaxunlearn.methods.rule import cross_entropy
from jaxunlearn.models.network import make_network
from jaxunlearn.registry import get_method
from jaxunlearn.runs.request import Request, settled

pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.numbers]
BENCH = "resnet20-digits-class0"


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def platform(request, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def equations(jaxpr):
    """Those of a program and of all programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
        ):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_product_of_a_step_is_in_the_precision_asked_for(platform, precision):
    protocol = dataclasses.replace(PROTOCOL, model=PLAIN, precision=precision)
    network, batch = make_network(protocol, CLASSES), make_batch(4, seed=0)

    def loss(params, batch_stats):
        logits, _ = network.apply_train(params, batch_stats, batch.images, jax.random.key(0))
        return cross_entropy(logits, batch.labels)

    variables = jax.eval_shape(network.initialise, jax.random.key(0))
    with computing(precision):
        program = jax.make_jaxpr(jax.grad(loss))(*variables)
    products = [e for e in equations(program.jaxpr) if e.primitive.name in ("conv_general_dilated", "dot_general")]
    asked = {str(e.params["precision"]) for e in products}
    highest = str((jax.lax.Precision.HIGHEST,) * 2)
    assert len(products) >= 4
    if platform == "cpu":  # knows no other, and keeps the programs that it has compiled
        assert asked <= {"None"}
    elif precision == "fp32":
        assert asked == {highest}
    else:
        assert highest not in asked
    kept = {x.aval.dtype for x in program.jaxpr.invars}
    assert kept == {jnp.dtype("float32")}
    assert (precision == "bf16") == any(e.outvars[0].aval.dtype == jnp.bfloat16 for e in products)


def test_the_default_is_tf32_on_a_gpu_and_what_was_chosen_stays(platform):
    own = get_benchmark(BENCH)
    assert default_precision() == settled(own, ()).precision == ("tf32" if platform == "gpu" else "fp32")
    assert settled(own, ("precision",)).precision == "fp32"
    assert settled(dataclasses.replace(own, precision="bf16"), ()).precision == "bf16"


def test_records_of_platforms_and_precisions_have_folders_of_their_own(monkeypatch):
    paths, method = {}, get_method("scrub")
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        for precision in benchmarks.CHOICES["precision"]:
            protocol = dataclasses.replace(get_benchmark(BENCH), precision=precision)
            request = Request(BENCH, protocol, [method], [42], Path("runs"), Path("cache"))
            paths[platform, precision] = request.record_path(method, 42)
    assert paths["cpu", "fp32"] == Path("runs") / BENCH / "scrub" / "seed42.json"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for kind in ("NVIDIA H100", "NVIDIA H200"):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [SimpleNamespace(device_kind=kind)])
        paths[kind] = request.record_path(method, 42)
    assert len(set(paths.values())) == len(paths)


def test_tf32_is_fp32_on_a_cpu():
    batch, logits = make_batch(4, seed=0), []
    for precision in ("fp32", "tf32"):
        network = make_network(dataclasses.replace(PROTOCOL, precision=precision), CLASSES)
        with computing(precision):
            logits.append(jax.jit(network.apply_eval)(*jax.jit(network.initialise)(jax.random.key(0)), batch.images))
    np.testing.assert_array_equal(*logits)


def test_deterministic_is_a_flag_that_xla_reads_once():
    code = (
        "import jax, os\n"
        "from jaxunlearn.devices.configuration import DETERMINISTIC, request_devices\n"
        "from jaxunlearn.errors import UserError\n"
        "os.environ['XLA_FLAGS'] = '--xla_cpu_enable_fast_math=false'\n"
        "request_devices(1, deterministic=True)\n"
        "request_devices(1, deterministic=True)\n"
        "print(os.environ['XLA_FLAGS'].split().count(DETERMINISTIC), len(os.environ['XLA_FLAGS'].split()))\n"
        "jax.devices()\n"  # XLA ends the process at a flag that it does not know
        "del os.environ['XLA_FLAGS']\n"
        "try:\n"
        "    request_devices(1, deterministic=True)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert printed[0] == "1 2" and printed[1].startswith("--deterministic: JAX is in use already") and len(printed) == 2
