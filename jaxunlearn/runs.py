"""One benchmark run: data -> pretrain or load -> unlearn with each method -> evaluate -> record."""

import dataclasses
import datetime
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import records
from jaxunlearn.benchmarks import Protocol, get_benchmark, validate
from jaxunlearn.checkpoints import pretrain_entry
from jaxunlearn.data.batches import Images, resize
from jaxunlearn.data.datasets import DATASETS, ImageSet, load
from jaxunlearn.errors import UserError
from jaxunlearn.evaluation import Evaluator
from jaxunlearn.files import check_writable
from jaxunlearn.loop import Timing, batch_sizes
from jaxunlearn.methods import RETRAIN, Method
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import to_state_dict
from jaxunlearn.models.weight_files import write_safetensors
from jaxunlearn.pretrained import Models, given, train_or_load
from jaxunlearn.progress import Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.sharding import make_mesh, place_shared
from jaxunlearn.training import Pretraining
from jaxunlearn.unlearning import Split, Unlearning


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for."""

    bench: str
    protocol: Protocol
    methods: Sequence[Method]
    seeds: Sequence[int]
    out: Path
    cache_dir: Path
    data_dir: Path | None = None
    init_weights: Path | None = None
    export_weights: Path | None = None
    devices: int | None = None
    force: bool = False

    def record_path(self, method: Method, seed: int) -> Path:
        """Where the record of a method and seed is kept: apart from the benchmark's own if any setting differs."""
        own, used = dataclasses.asdict(get_benchmark(self.bench)), dataclasses.asdict(self.protocol)
        differs = {name: value for name, value in used.items() if value != own[name]}
        differs |= {f"{method.name}.{k}": v for k, v in method.hyperparameters.items() if v != method.defaults[k]}
        return records.record_path(self.out, self.bench, method.name, seed, differs)

    def weights_path(self, method: Method, seed: int) -> Path | None:
        """Where the unlearned model goes: below `export_weights` what the record is below `out`."""
        if self.export_weights is None:
            return None
        record = self.record_path(method, seed).relative_to(self.out)
        return self.export_weights / record.with_suffix(".safetensors")


class Run:
    """A request made ready: checked, its data on the device. Nothing has been written yet.

    Raises UserError for everything that can be known to be wrong before hours of training.
    """

    def __init__(self, request: Request, reporter: Reporter):
        protocol = request.protocol
        self.request, self.reporter, self.timing = request, reporter, Timing()
        validate(protocol, DATASETS[protocol.dataset].num_classes)
        for folder in filter(None, (request.out, request.cache_dir, request.export_weights)):
            check_writable(folder)
        for method, seed in itertools.product(request.methods, request.seeds):
            path = request.record_path(method, seed)
            records.check_overwrite(path, dataclasses.asdict(protocol), method.hyperparameters, request.force)
        self.mesh = make_mesh(len(request.seeds), request.devices)
        self.keys = seed_keys(request.seeds)
        self.network = make_network(protocol, DATASETS[protocol.dataset].num_classes)
        with jax.set_mesh(self.mesh):
            weights, count = request.init_weights, len(request.seeds)
            self.given = given(weights, self.network, count, self.mesh) if weights else None
            with self.timing("data_s"):
                dataset = load(protocol.dataset, request.data_dir, request.cache_dir)
                train = limited(dataset.train, dataset.num_classes, protocol.train_limit)
                self.train, test = on_device(train, self.mesh), on_device(dataset.test, self.mesh)
            is_forget = train.labels == protocol.forget_class
            self.split = Split(np.flatnonzero(~is_forget), np.flatnonzero(is_forget))
            self.digest = dataset.digest
            members = Images(*(part[self.split.forget] for part in self.train))
            self.evaluator = Evaluator(self.network, protocol, test, members, self.mesh, self.timing)
            every, retained = (
                batch_sizes(count, protocol.batch_size, protocol.drop_last, kind)
                for count, kind in ((len(train.labels), "training"), (len(self.split.retain), "retain"))
            )
            self.pretrain_images = sum(every) * protocol.pretrain_epochs
            self.retrain_steps = len(retained) * protocol.pretrain_epochs
            self.unlearnings = {
                method.name: Unlearning(
                    method, self.network, protocol, dataset.num_classes, self.train, self.split, self.mesh, self.timing
                )
                for method in request.methods
                if method.name != RETRAIN
            }

    def results(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Runs every method; yields each record once it is written, and a warning where something was not."""
        request = self.request
        with jax.set_mesh(self.mesh):
            pretrained = self.given or self._train_or_load(without=None)
            with self.timing("evaluate_s"):
                before = self.evaluator.metrics(pretrained.params, pretrained.batch_stats, self.keys)
            common = dict(self.timing)
            for method in request.methods:
                self.timing.clear()
                if method.name == RETRAIN:
                    models = self._train_or_load(without=request.protocol.forget_class)
                    steps = self.retrain_steps
                else:
                    models = self._unlearn(method.name, pretrained)
                    steps = self.unlearnings[method.name].steps_per_epoch * request.protocol.unlearn_epochs
                with self.timing("evaluate_s"):
                    after = self.evaluator.metrics(models.params, models.batch_stats, self.keys)
                for i, seed in enumerate(request.seeds):
                    record = self._record(
                        method, seed, before[i], after[i], pretrained.seconds[i], models.seconds[i], steps, common
                    )
                    yield record, self._keep(method, i, record, models)

    def _keep(self, method: Method, index: int, record: dict[str, Any], models: Models) -> str | None:
        """Writes one seed's record and, if asked to, its model. Returns a warning where one of them was not written."""
        request, seed = self.request, self.request.seeds[index]
        path, weights = request.record_path(method, seed), request.weights_path(method, seed)
        if not records.write(path, record, request.force):
            return f"{path} holds a better record, kept; --force replaces it"
        if weights and record["status"] != "ok":
            return f"{weights} was not written: the model diverged"
        if weights:
            variables = {"params": models.params, "batch_stats": models.batch_stats}
            write_safetensors(weights, to_state_dict(jax.device_get(jax.tree.map(lambda x: x[index], variables))))
        return None

    def _train_or_load(self, without: int | None) -> Models:
        request = self.request
        indices = np.arange(len(self.train.labels)) if without is None else self.split.retain
        entries = [
            pretrain_entry(request.cache_dir, request.protocol, self.digest, seed, without) for seed in request.seeds
        ]

        def make_pretraining(num_seeds: int) -> Pretraining:
            mesh = make_mesh(num_seeds, self.mesh.size)
            return Pretraining(self.network, request.protocol, self.train, indices, mesh, self.timing)

        title = "pretrain" if without is None else RETRAIN
        return train_or_load(make_pretraining, entries, request.seeds, self.mesh, self.reporter, title)

    def _unlearn(self, name: str, pretrained: Models) -> Models:
        unlearning, count = self.unlearnings[name], len(self.request.seeds)
        carry = unlearning.start(pretrained.params, pretrained.batch_stats, self.keys)
        images = unlearning.images_per_epoch * count
        with (
            self.reporter.task(name, unlearning.epochs, unlearning.steps_per_epoch, images) as report,
            self.timing("unlearn_s"),
        ):
            for epoch in range(unlearning.epochs):
                carry, _ = unlearning.epoch(carry, self.keys, epoch, report(epoch))
        return Models(carry.params, carry.batch_stats, [self.timing["unlearn_s"] / count] * count)

    def _record(
        self,
        method: Method,
        seed: int,
        before: dict[str, Any],
        after: dict[str, Any],
        pretrain_s: float,
        unlearn_s: float,
        steps: int,
        common: dict[str, float],
    ) -> dict[str, Any]:
        request, count = self.request, len(self.request.seeds)
        timing = {
            "data_s": common["data_s"],
            "compile_s": common.get("compile_s", 0.0) + self.timing.get("compile_s", 0.0),
            "pretrain_s": pretrain_s,
            "unlearn_s": unlearn_s,
            "evaluate_s": self.timing["evaluate_s"] / count,
        }
        throughput = {
            "pretrain_images_per_s": self.pretrain_images / pretrain_s if pretrain_s else None,
            "unlearn_steps_per_s": steps / unlearn_s,
        }
        return {
            "bench": request.bench,
            "method": method.name,
            "seed": seed,
            **after,
            "before": before,
            "unlearn_steps": steps,
            "protocol": dataclasses.asdict(request.protocol),
            "hyperparameters": method.hyperparameters,
            "timing": {name: round(seconds, 3) for name, seconds in timing.items()},
            "throughput": {name: rate and round(rate, 3) for name, rate in throughput.items()},
            "environment": records.environment() | {"device_count": self.mesh.size},
            "status": "diverged" if after["retain_acc"] is None else "ok",
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def limited(images: ImageSet, num_classes: int, limit: int | None) -> ImageSet:
    """The first `limit // num_classes` images of every class, in file order; all of them where `limit` is None."""
    if limit is None:
        return images
    if limit > len(images.labels):
        raise UserError(f"--train-limit {limit}: there are only {len(images.labels)} training images")
    each = limit // num_classes
    chosen = np.sort(np.concatenate([np.flatnonzero(images.labels == c)[:each] for c in range(num_classes)]))
    return ImageSet(images.images[chosen], images.labels[chosen])


def on_device(images: ImageSet, mesh: jax.sharding.Mesh) -> Images:
    """The images on every device of the mesh, enlarged to 32 x 32 where they are smaller."""
    pixels, labels = place_shared((jnp.asarray(images.images), jnp.asarray(images.labels, jnp.int32)), mesh)
    return Images(jax.jit(resize)(pixels), labels)
