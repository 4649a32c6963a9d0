"""What makes a run ready: everything that can be known to be wrong is said here, before hours of training."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn.benchmarks import EVALUATIONS, MOST_SEEDS, validate
from jaxunlearn.data.batches import Images, resize
from jaxunlearn.data.datasets import DATASETS, ImageSet, held_out, limited, load
from jaxunlearn.devices.configuration import unused_gpu
from jaxunlearn.devices.processes import all_or_none, check_agreement, leads
from jaxunlearn.devices.sharding import make_mesh, place_shared
from jaxunlearn.errors import UserError
from jaxunlearn.evaluation.predictions import BATCH_SIZE, Evaluator
from jaxunlearn.evaluation.relearning import Relearning
from jaxunlearn.files import LOCK_REMEDY, check_lockable, check_writable
from jaxunlearn.methods.rule import Context
from jaxunlearn.models.network import Network, make_network
from jaxunlearn.ops import native
from jaxunlearn.progress import Reporter
from jaxunlearn.randomness import seed_keys
from jaxunlearn.registry import RETRAIN, Method, build_rule, names
from jaxunlearn.results.environment import environment
from jaxunlearn.results.records import check_images, check_overwrite
from jaxunlearn.runs.event_files import EventFiles, check_tensorboard
from jaxunlearn.runs.groups import Group, alike, differing, first_of_each, grouped, titled
from jaxunlearn.runs.request import Request
from jaxunlearn.training.checking import check_rule
from jaxunlearn.training.loop import Timing, batch_sizes
from jaxunlearn.training.pretrained import Models, given
from jaxunlearn.training.unlearning import Split, Unlearning, make_context


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A request made ready: checked, its data on the device. Nothing has been written yet."""

    request: Request
    reporter: Reporter
    timing: Timing
    mesh: jax.sharding.Mesh
    keys: jax.Array  # one a seed
    network: Network
    given: Models | None  # the weights to start from, where the user has some
    train: Images
    split: Split
    digest: str  # of the data set
    verified: bool  # whether that is the official one's
    evaluator: Evaluator
    relearning: Relearning | None  # where the models are evaluated in full
    events: EventFiles | None  # where they are asked for, in the process that writes
    groups: list[Group] = dataclasses.field(default_factory=list)
    unlearnings: dict[str, Unlearning] = dataclasses.field(default_factory=dict)  # by title, until it is done

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """What the records say that they were measured on; looked up once a run."""
        return environment() | {"device_count": self.mesh.size, "process_count": jax.process_count()}

    @property
    def table_facts(self) -> dict[str, Any]:
        """What `print_results` asks for beside the records."""
        members, non_members = self.evaluator.counts
        defaults = {method.name: method.defaults for method in self.request.methods}
        return {"defaults": defaults, "members": members, "non_members": non_members}

    def count(self, group: Group) -> int:
        """How many models a group makes."""
        return len(self.keys) * self.request.draws(group.method) * len(group.methods)

    def work(self, group: Group) -> float:
        """On how many images a group's models are trained; those that they are only asked about count a third."""
        asked = self.evaluator.steps * BATCH_SIZE / 3
        if group.method.name == RETRAIN:
            epochs, images = self.request.protocol.pretrain_epochs, sum(self.batches(len(self.split.retain), "retain"))
        else:
            epochs, images = (own := self.unlearnings[group.title]).epochs, own.images_per_epoch
            if (every := self.request.eval_every) and epochs:
                asked *= 1 + (epochs - 1) // every
        return self.count(group) * (epochs * images + asked)

    @property
    def pretraining_work(self) -> float:
        """The same of pretraining."""
        epochs = self.request.protocol.pretrain_epochs
        return len(self.keys) * epochs * sum(self.batches(len(self.train.labels), "training"))

    def batches(self, count: int, kind: str) -> list[int]:
        """The sizes of the batches of an epoch of (re)training on so many images of this `kind`."""
        protocol = self.request.protocol
        return batch_sizes(count, protocol.batch_size, protocol.drop_last, kind)

    def unlearning(self, group: Group, mesh: jax.sharding.Mesh) -> Unlearning:
        """The unlearning of a group, for the seeds on `mesh`. Raises UserError for a rule that breaks its contract."""
        protocol = self.request.protocol
        classes = DATASETS[protocol.dataset].num_classes
        own = self.train, self.split, mesh, self.timing, group.numbers
        return Unlearning(group.method, self.network, protocol, classes, *own)


def prepare(request: Request, reporter: Reporter) -> Prepared:
    """Makes a request ready. Raises UserError for whatever is wrong with it."""
    protocol, timing = request.protocol, Timing()
    if (request.init_weights is None) != (protocol.init_weights is None):
        raise UserError("init_weights: the file and its SHA-256 in the protocol go together, one of them is missing")
    if not 0 <= request.save_every < float("inf"):
        raise UserError(f"--save-every {request.save_every}: it must be at least 0")
    if not 1 <= request.unlearn_seeds <= MOST_SEEDS // len(request.seeds):
        raise UserError(
            f"--unlearn-seeds {request.unlearn_seeds}: it must be at least 1, with {len(request.seeds)} seeds at most "
            f"{MOST_SEEDS // len(request.seeds):,}"
        )
    if request.evaluate not in EVALUATIONS:
        raise UserError(f"--evaluate {request.evaluate}: choose from {', '.join(EVALUATIONS)}")
    if request.eval_every is not None and request.eval_every < 1:
        raise UserError(f"--eval-every {request.eval_every}: it must be at least 1")
    if request.attempts < 1:
        raise UserError(f"--attempts {request.attempts}: it must be at least 1")
    num_classes = DATASETS[protocol.dataset].num_classes
    validate(protocol, num_classes)
    native.keep_in(request.cache_dir)
    mesh = make_mesh(len(request.seeds), request.devices)
    if not leads():
        reporter = Reporter(quiet=True)
    elif line := unused_gpu():
        warnings.warn(line, stacklevel=2)
    # Before anything that takes long: processes wait only half a minute for each other the first time.
    check_agreement(f"{request.settings} {jax.__version__} {jax.dtypes.canonicalize_dtype(float)}")
    keys = seed_keys(request.seeds)
    network = make_network(protocol, num_classes)
    with jax.set_mesh(mesh):
        with all_or_none():
            if leads():
                _check_outputs(request)
            weights = request.init_weights
            models = given(weights, protocol, network, len(request.seeds), mesh) if weights else None
            context = make_context(network, protocol, num_classes, steps_per_epoch=1)
            _check_rules(request, context)
            with timing("data_s"):
                dataset = load(protocol.dataset, request.data_dir, request.cache_dir, reporter.shows)
            for path, _ in _outputs(request) if leads() else ():
                check_images(path, dataset.digest, dataset.verified, request.force)
        check_agreement(dataset.digest)
        with timing("data_s"):
            chosen = limited(dataset.train, dataset.num_classes, protocol.train_limit)
            asked = dataset.test
            if protocol.validation:
                chosen, asked = held_out(chosen, dataset.num_classes)
            train, test = _on_device(chosen, mesh), _on_device(asked, mesh)
        is_forget = chosen.labels == protocol.forget_class
        split = Split(np.flatnonzero(~is_forget), np.flatnonzero(is_forget))
        full = request.evaluate == "full"
        evaluator = Evaluator(network, protocol, train, split, test, mesh, timing, features=full)
        relearning = Relearning(network, protocol, train, split.forget, test, mesh, timing) if full else None
        prepared = Prepared(
            request,
            reporter,
            timing,
            mesh,
            keys,
            network,
            models,
            train,
            split,
            dataset.digest,
            dataset.verified,
            evaluator,
            relearning,
            EventFiles(request.tensorboard) if request.tensorboard and leads() else None,
        )
        for count, kind in ((len(chosen.labels), "training"), (len(split.retain), "retain")):
            prepared.batches(count, kind)  # raises where they make no batch
        groups = _groups(prepared)
        made: dict[str, Unlearning] = {}  # by program: variants that run one after the other share what is compiled
        for group in groups:
            if group.method.name != RETRAIN and group.program not in made:
                made[group.program] = prepared.unlearning(group, make_mesh(prepared.count(group), request.devices))
        unlearnings = {group.title: made[group.program] for group in groups if group.program in made}
        for group in first_of_each(groups):  # all variants were looked at above, with smaller batches
            if group.title in unlearnings:
                unlearnings[group.title].check()
        return dataclasses.replace(prepared, groups=groups, unlearnings=unlearnings)


def _check_rules(request: Request, context: Context) -> None:
    """Raises UserError for a hyperparameter that a rule refuses, and for a user's rule that breaks the contract."""
    for method in request.methods:
        rule = None if method.name == RETRAIN else build_rule(method, context)
        if rule and method.name not in names():
            check_rule(method, rule, context, [(4, 4)])


def _groups(run: Prepared) -> list[Group]:
    """What runs together; of a rule that looks at its numbers each variant runs alone, in a program of its own."""
    most = run.request.together or (1 if jax.default_backend() == "cpu" else None)
    groups: list[Group] = []
    for methods in alike(run.request.methods):
        numbers = differing(methods)
        if numbers and not run.unlearning(Group(methods, numbers), run.mesh).takes_numbers():
            numbers = []
        groups += grouped(methods, numbers, most)
    return titled(groups)


def _check_outputs(request: Request) -> None:
    """Raises UserError where the results of a run could not be written."""
    if request.tensorboard:
        check_tensorboard()
    for folder in filter(None, (request.out, request.cache_dir, request.export_weights, request.tensorboard)):
        check_writable(folder)
    check_lockable(request.cache_dir, LOCK_REMEDY)
    protocol = dataclasses.asdict(request.protocol)
    for path, method in _outputs(request):
        check_overwrite(path, protocol, method.hyperparameters, request.force)


def _outputs(request: Request) -> Iterator[tuple[Path, Method]]:
    """The path of each record that the request will make, and its method."""
    for method, seed in itertools.product(request.methods, request.seeds):
        for draw in range(request.draws(method)):
            yield request.record_path(method, seed, draw), method


def _on_device(images: ImageSet, mesh: jax.sharding.Mesh) -> Images:
    """The images on every device of the mesh, enlarged to 32 x 32 where they are smaller."""
    pixels, labels = place_shared((images.images, images.labels.astype(np.int32)), mesh)
    return Images(jax.jit(resize)(pixels), labels)
