"""One benchmark run: data -> pretrain or load -> unlearn with each method -> evaluate -> record."""

import dataclasses
import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn import records
from jaxunlearn.benchmarks import Protocol, get_benchmark, validate
from jaxunlearn.checkpoints import Entry, discard, locked, pretrain_entry, unlearn_entry
from jaxunlearn.data.batches import Images, resize
from jaxunlearn.data.datasets import DATASETS, ImageSet, limited, load
from jaxunlearn.errors import UserError, WriteError, one_line
from jaxunlearn.evaluation import BATCH_SIZE, Evaluator
from jaxunlearn.files import check_writable
from jaxunlearn.loop import Timing, batch_sizes
from jaxunlearn.methods import RETRAIN, Method, build_rule, names
from jaxunlearn.metrics import diverged_metrics
from jaxunlearn.models.network import make_network
from jaxunlearn.models.torch_weights import to_state_dict
from jaxunlearn.models.weight_files import write_safetensors
from jaxunlearn.pretrained import Models, given
from jaxunlearn.processes import all_or_none, check_agreement, leads, meet
from jaxunlearn.progress import Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.resuming import Start, train
from jaxunlearn.sharding import fetch, make_mesh, place_seeds, place_shared
from jaxunlearn.training import Pretraining
from jaxunlearn.unlearning import Split, Unlearning, check_rule, make_context

COLLAPSE = 0.1  # of the accuracy on the retained classes


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
    save_every: float = 120.0  # seconds between two checkpoints
    force: bool = False

    def record_path(self, method: Method, seed: int) -> Path:
        """Where the record of a method and seed is kept: apart from the benchmark's own if any setting differs."""
        own, used = dataclasses.asdict(get_benchmark(self.bench)), dataclasses.asdict(self.protocol)
        differs = {name: value for name, value in used.items() if value != own[name]}
        differs |= {f"{method.name}.{k}": v for k, v in method.hyperparameters.items() if v != method.defaults[k]}
        return records.record_path(self.out, self.bench, method.name, seed, differs)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What every process of a run must have been told alike."""
        methods = [(method.name, method.hyperparameters, method.source) for method in self.methods]
        return self.bench, self.protocol, methods, self.seeds, self.devices, self.export_weights is None

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
        if (request.init_weights is None) != (protocol.init_weights is None):
            raise UserError(
                "init_weights: the file and its SHA-256 in the protocol go together, one of them is missing"
            )
        num_classes = DATASETS[protocol.dataset].num_classes
        validate(protocol, num_classes)
        self.mesh = make_mesh(len(request.seeds), request.devices)
        if not leads():
            self.reporter = Reporter(quiet=True)
        # Before anything that takes long: processes wait only half a minute for each other the first time.
        check_agreement(f"{request.settings} {jax.__version__} {jax.dtypes.canonicalize_dtype(float)}")
        self.keys = seed_keys(request.seeds)
        self.network = make_network(protocol, num_classes)
        with jax.set_mesh(self.mesh):
            with all_or_none():
                if leads():
                    check_outputs(request)
                weights, count = request.init_weights, len(request.seeds)
                self.given = given(weights, self.network, count, self.mesh) if weights else None
                context = make_context(self.network, protocol, num_classes, steps_per_epoch=1)
                for method in request.methods:
                    if method.name not in (*names(), RETRAIN):  # the user's own, which is looked at before a download
                        check_rule(method, build_rule(method, context), context)
                with self.timing("data_s"):
                    dataset = load(protocol.dataset, request.data_dir, request.cache_dir, self.reporter.shows)
            check_agreement(dataset.digest)
            with self.timing("data_s"):
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
                method.name: self._make_unlearning(method, self.mesh)
                for method in request.methods
                if method.name != RETRAIN
            }

    def results(self) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Runs every method; yields each record once it is written, and a warning where something was not."""
        request = self.request
        with jax.set_mesh(self.mesh), ExitStack() as locks:
            pretrained = self.given or self._train_or_load(without=None)
            before = self._evaluate(pretrained)
            common = dict(self.timing)
            entries = {m.name: self._unlearn_entries(m) for m in request.methods if m.name in self.unlearnings}
            unfinished = list(itertools.chain(*entries.values()))
            locks.enter_context(locked(unfinished))  # all at once: two processes must not wait for each other
            for method in request.methods:
                self.timing.clear()
                if method.name == RETRAIN:
                    models = self._train_or_load(without=request.protocol.forget_class)
                    steps = self.retrain_steps
                else:
                    models = self._unlearn(method, entries[method.name], pretrained)
                    steps = self.unlearnings[method.name].steps_per_epoch * request.protocol.unlearn_epochs
                after = self._evaluate(models)
                for i in range(len(request.seeds)):
                    record = self._record(method, i, before[i], after[i], pretrained, models, steps, common)
                    yield record, self._keep(method, i, record, models)
            if leads():
                for entry in unfinished:  # only now: after an interruption the methods that are done are not redone
                    discard(entry)
            meet()  # a process that ends takes the others with it

    def _evaluate(self, models: Models) -> list[dict[str, Any]]:
        images = self.evaluator.steps * BATCH_SIZE * len(self.keys)
        with self.timing("evaluate_s"), self.reporter.task("evaluate", 1, self.evaluator.steps, images) as report:
            return self.evaluator.metrics(models.params, models.batch_stats, self.keys, report(0))

    def _keep(self, method: Method, index: int, record: dict[str, Any], models: Models) -> str | None:
        """Writes one seed's record and, if asked to, its model. Returns a warning where one of them was not written."""
        request, seed = self.request, self.request.seeds[index]
        path, weights = request.record_path(method, seed), request.weights_path(method, seed)
        variables = {"params": models.params, "batch_stats": models.batch_stats}
        own = fetch(jax.tree.map(lambda x: x[index], variables)) if weights else {}
        if not leads():
            return None
        try:
            if not records.write(path, record, request.force):
                return f"{path} holds a better record, kept; --force replaces it"
            if weights and record["status"] != "ok":
                return f"{weights} was not written: the model diverged"
            if weights:
                write_safetensors(weights, to_state_dict(own))
        except OSError as error:
            message = f"cannot write the results of {method.name} ({one_line(error)})"
            raise WriteError(f"{message}: put that right and run the same command, which goes on from here") from error
        return None

    def _train_or_load(self, without: int | None) -> Models:
        request = self.request
        indices = np.arange(len(self.train.labels)) if without is None else self.split.retain
        entries = [
            pretrain_entry(request.cache_dir, request.protocol, self.digest, seed, without) for seed in request.seeds
        ]

        def start(group: list[int]) -> Start:
            mesh = make_mesh(len(group), request.devices)
            pretraining = Pretraining(self.network, request.protocol, self.train, indices, mesh, self.timing)
            return Start(pretraining, lambda: pretraining.start(seed_keys([request.seeds[i] for i in group])))

        with locked(entries):
            return self._to_the_end(start, entries, "pretrain" if without is None else RETRAIN)

    def _unlearn(self, method: Method, entries: Sequence[Entry], pretrained: Models) -> Models:
        if None not in pretrained.diverged:
            return pretrained._replace(seconds=[0.0] * len(self.keys))

        def start(group: list[int]) -> Start:
            unlearning = self.unlearnings[method.name]
            if len(group) < len(self.keys):
                unlearning = self._make_unlearning(method, make_mesh(len(group), self.request.devices))
            chosen = np.asarray(group)
            models = place_seeds(
                jax.tree.map(lambda x: x[chosen], (pretrained.params, pretrained.batch_stats)), unlearning.mesh
            )
            return Start(unlearning, lambda: unlearning.start(models[0], models[1], self.keys[chosen]))

        return self._to_the_end(start, entries, method.name)

    def _to_the_end(self, start: Callable[[list[int]], Start], entries: Sequence[Entry], title: str) -> Models:
        request = self.request
        trained = train(start, entries, request.seeds, self.mesh, self.reporter, title, request.save_every)
        return Models(trained.state.params, trained.state.batch_stats, trained.seconds, trained.diverged)

    def _make_unlearning(self, method: Method, mesh: jax.sharding.Mesh) -> Unlearning:
        num_classes = DATASETS[self.request.protocol.dataset].num_classes
        return Unlearning(
            method, self.network, self.request.protocol, num_classes, self.train, self.split, mesh, self.timing
        )

    def _unlearn_entries(self, method: Method) -> list[Entry]:
        request = self.request
        return [unlearn_entry(request.cache_dir, request.protocol, self.digest, seed, method) for seed in request.seeds]

    def _record(
        self,
        method: Method,
        index: int,
        before: dict[str, Any],
        after: dict[str, Any],
        pretrained: Models,
        models: Models,
        steps: int,
        common: dict[str, float],
    ) -> dict[str, Any]:
        request, count = self.request, len(self.request.seeds)
        pretrain_s, unlearn_s = pretrained.seconds[index], models.seconds[index]
        diverged_at = diverged(pretrained.diverged[index], models.diverged[index], after)
        after = diverged_metrics() if diverged_at else after
        timing = {
            "data_s": common["data_s"],
            "compile_s": common.get("compile_s", 0.0) + self.timing.get("compile_s", 0.0),
            "pretrain_s": pretrain_s,
            "unlearn_s": unlearn_s,
            "evaluate_s": self.timing["evaluate_s"] / count,
            "checkpoint_s": (common.get("checkpoint_s", 0.0) + self.timing.get("checkpoint_s", 0.0)) / count,
        }
        throughput = {
            "pretrain_images_per_s": self.pretrain_images / pretrain_s if pretrain_s else None,
            "unlearn_steps_per_s": steps / unlearn_s if unlearn_s else None,
        }
        return {
            "bench": request.bench,
            "method": method.name,
            "seed": request.seeds[index],
            **after,
            "before": before,
            "unlearn_steps": steps,
            "protocol": dataclasses.asdict(request.protocol),
            "hyperparameters": method.hyperparameters,
            "timing": {name: round(seconds, 3) for name, seconds in timing.items()},
            "throughput": {name: rate and round(rate, 3) for name, rate in throughput.items()},
            "environment": records.environment()
            | {"device_count": self.mesh.size, "process_count": jax.process_count()},
            "status": "ok" if diverged_at is None else "diverged",
            "diverged_at": diverged_at,
            "collapsed": has_collapsed(before, after),
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def check_outputs(request: Request) -> None:
    """Raises UserError where the results of a run could not be written."""
    for folder in filter(None, (request.out, request.cache_dir, request.export_weights)):
        check_writable(folder)
    for method, seed in itertools.product(request.methods, request.seeds):
        path = request.record_path(method, seed)
        protocol = dataclasses.asdict(request.protocol)
        records.check_overwrite(path, protocol, method.hyperparameters, request.force)


def diverged(pretraining: int | None, unlearning: int | None, after: dict[str, Any]) -> dict[str, Any] | None:
    """Where a seed's run ended early: `phase`, and `step` of it, from 0; None where it did not."""
    for phase, step in (("pretrain", pretraining), ("unlearn", unlearning)):
        if step is not None:
            return {"phase": phase, "step": step}
    return {"phase": "evaluate", "step": None} if after["retain_acc"] is None else None


def has_collapsed(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether unlearning cost more than `COLLAPSE` of the accuracy on the retained classes."""
    both = before["retain_acc"], after["retain_acc"]
    return None not in both and both[0] - both[1] > COLLAPSE


def on_device(images: ImageSet, mesh: jax.sharding.Mesh) -> Images:
    """The images on every device of the mesh, enlarged to 32 x 32 where they are smaller."""
    pixels, labels = place_shared((images.images, images.labels.astype(np.int32)), mesh)
    return Images(jax.jit(resize)(pixels), labels)
