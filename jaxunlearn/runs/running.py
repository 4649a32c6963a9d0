"""What runs a prepared request: pretrain or load, unlearn with each method, evaluate, write."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxunlearn.devices.configuration import computing, programs_kept
from jaxunlearn.devices.processes import leads, meet
from jaxunlearn.devices.sharding import fetch, make_mesh, place_seeds
from jaxunlearn.evaluation.normalisations import LOW, better_normalisation
from jaxunlearn.evaluation.predictions import has_predictions, packed
from jaxunlearn.files import AGAIN, write_atomically, writing
from jaxunlearn.models.torch_weights import to_state_dict
from jaxunlearn.models.weight_files import write_safetensors
from jaxunlearn.progress import Reporter
from jaxunlearn.registry import PRETRAINED, RETRAIN, Method
from jaxunlearn.results import records
from jaxunlearn.runs.compiling import EVALUATE, RELEARN, compiled_ahead
from jaxunlearn.runs.groups import Group
from jaxunlearn.runs.preparation import Prepared
from jaxunlearn.runs.recording import make_record
from jaxunlearn.runs.scoring import Asked, Scorer
from jaxunlearn.training.checkpoints import Entry, discard, locked, pretrain_entry, unlearn_entry
from jaxunlearn.training.judging import judge_of
from jaxunlearn.training.pretrained import Models, repeated
from jaxunlearn.training.pretraining import Pretraining
from jaxunlearn.training.resuming import Redraw, Start, Told, Watch, train


def results(run: Prepared) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Runs every method; yields each record once it is written, and a warning where something was not."""
    request = run.request
    with ExitStack() as stack:
        stack.enter_context(programs_kept(request.cache_dir))
        stack.enter_context(computing(request.protocol.precision))
        stack.enter_context(jax.set_mesh(run.mesh))
        ahead = stack.enter_context(compiled_ahead(run))
        if run.events:
            stack.enter_context(closing(run.events))
        work = [run.work(group) for group in run.groups]
        whole = sum(work) + (0 if run.given else run.pretraining_work)
        pretrained = run.given or _train_or_load(run, None, run.reporter.before(sum(work), whole, advise=True))
        ahead.ready(EVALUATE)
        ahead.ready(RELEARN)
        scorer = Scorer(run)
        originals = scorer.start_from(pretrained)
        _keep_originals(run, originals)
        if run.given is not None:
            _check_normalisation(run, originals.results[0]["retain_acc"], pretrained)
        common = dict(run.timing)
        entries = {g.title: _unlearn_entries(run, g, pretrained) for g in run.groups if g.title in run.unlearnings}
        unfinished = list(itertools.chain(*entries.values()))
        if not request.once:  # all at once: two processes must not wait for each other
            stack.enter_context(locked(_of_first_draws(unfinished)))
        before: list[dict[str, Any]] = []
        for number, group in enumerate(run.groups):
            run.timing.clear()
            reporter = run.reporter.before(sum(work[number + 1 :]), whole)
            own = entries.get(group.title, [])
            with locked(_of_first_draws(own) if request.once else []):
                if group.method.name == RETRAIN:  # the first of them
                    asked = scorer.compare_with(_train_or_load(run, request.protocol.forget_class, reporter))
                    steps = len(run.batches(len(run.split.retain), "retain")) * request.protocol.pretrain_epochs
                else:
                    ahead.ready(group.title)
                    asked = scorer.ask(_unlearn(run, group, own, pretrained, scorer, reporter))
                    steps = run.unlearnings.pop(group.title).steps
                if not before:
                    before = [scorer.worth(originals, i) for i in range(len(request.seeds))]
                after = [scorer.worth(asked, i, group.method.name) for i in range(len(asked.predictions))]
                for method, i, index in _places(run, group):
                    reference = None if method.name == RETRAIN else scorer.reference(index)  # it has no better one
                    worth = before[i], after[index], reference and reference[1]
                    record = make_record(run, method, index, (pretrained, asked.models), worth, steps, common)
                    _keep_events(run, group, index, record)
                    yield record, _keep(run, method, index, record, asked)
                del asked  # before the next one trains
                if request.once:
                    _discard(own)
        if not request.once:
            _discard(unfinished)  # only now: after an interruption the methods that are done are not redone
        meet()  # a process that ends takes the others with it


def _places(run: Prepared, group: Group) -> Iterator[tuple[Method, int, int]]:
    """(method, seed, index among the group's models) of each record of a group: methods, their seeds, their draws."""
    seeds, draws = len(run.request.seeds), run.request.draws(group.method)
    for number, i, draw in itertools.product(range(len(group.methods)), range(seeds), range(draws)):
        yield group.methods[number], i, (number * draws + draw) * seeds + i


def _of_first_draws(entries: Sequence[Entry]) -> list[Entry]:
    """What is to be locked: further draws are nobody's who has not the first."""
    return [entry for entry in entries if "unlearn_seed" not in entry.about]


def _discard(entries: Iterable[Entry]) -> None:
    for entry in entries if leads() else ():
        discard(entry)


def _check_normalisation(run: Prepared, accuracy: float | None, models: Models) -> None:
    """Warns where the given weights were made for images of another mean and standard deviation."""
    if accuracy is None or accuracy >= LOW:
        return  # nothing is compiled for a model that knows its test images
    line = better_normalisation(run.network, run.request.protocol, models.params, models.batch_stats, run.train)
    if line and leads():
        warnings.warn(line, stacklevel=2)


def _keep(run: Prepared, method: Method, index: int, record: dict[str, Any], asked: Asked) -> str | None:
    """Writes the record of one model and, if asked to, the model and what it says.

    Returns a warning where one of them was not written.
    """
    request, models = run.request, asked.models
    path = request.record_path(method, record["seed"], record["unlearn_seed"])
    weights = request.weights_path(path)
    variables = {"params": models.params, "batch_stats": models.batch_stats}
    own = fetch(jax.tree.map(lambda x: x[index], variables)) if weights else {}
    if not leads():
        return None
    with writing(f"the results of {method.name}", AGAIN):
        stored = records.write(path, record, request.force)
        fine = record["status"] == "ok"
        kept = path.with_suffix(".npz") if request.keep_predictions else None
        if kept and fine and stored:  # it says of which record it is: one that replaces that may be written without
            said = packed(asked.predictions[index], run.evaluator.labels, finished_at=record["finished_at"])
            write_atomically(kept, said)
        exported = fine and weights is not None and (stored or not weights.exists())  # beside the record that it is of
        if weights and exported:
            write_safetensors(weights, to_state_dict(own))
    missing = [str(file) for file, written in ((kept, fine and stored), (weights, exported)) if file and not written]
    lost = f"{' and '.join(missing)} was not written"
    if not stored:
        return f"{path} holds a better record, kept{f', and {lost}' if missing else ''}; --force replaces it"
    return f"{lost}: the model is {record['status']}" if missing else None


def _keep_events(run: Prepared, group: Group, index: int, record: dict[str, Any]) -> None:
    """Adds what a record knows to the event files, if there are any."""
    if run.events:
        original = _name(run, run.request.originals_path(record["seed"]))
        attempts = record["attempts"]
        curve = record["curves"]["pretrain"] or {}
        run.events.add_curve(original, _of_attempt("pretrain", attempts.get("pretrain", 1) - 1), curve)
        run.events.close_one(original)
        retrained = group.method.name == RETRAIN
        phase = _of_attempt(RETRAIN, attempts.get(RETRAIN, 1) - 1) if retrained else "unlearn"
        run.events.finish(_names(run, group)[index], record, phase)


def _name(run: Prepared, record: Path) -> Path:
    return record.relative_to(run.request.out).with_suffix("")


def _names(run: Prepared, group: Group) -> list[Path]:
    """Of the models of a group, by their index."""
    request, draws = run.request, range(run.request.draws(group.method))
    each = itertools.product(group.methods, draws, request.seeds)
    return [_name(run, request.record_path(method, seed, draw)) for method, draw, seed in each]


def _of_attempt(phase: str, attempt: int) -> str:
    """What the curve of a seed is called that was drawn again so often."""
    return f"{phase}-attempt{attempt + 1}" if attempt > 0 else phase


def _teller(run: Prepared, names: Sequence[Path], phase: str) -> Told:
    """What tells the event files, if there are any, of the training of the models with these names."""

    def told(index: int, attempt: int, epoch: int, means: dict[str, float | None]) -> None:
        if run.events:
            own = _of_attempt(phase, attempt)
            with run.timing("checkpoint_s"):
                run.events.add(names[index], epoch, {f"{own}/{name}": value for name, value in means.items()})

    return told


def _keep_originals(run: Prepared, originals: Asked) -> None:
    """Writes what the pretrained models say, if asked to; of one that diverged or learned nothing, that it failed."""
    if not (run.request.keep_predictions and leads()):
        return
    with writing(f"the results of {PRETRAINED}", AGAIN):
        for i, seed in enumerate(run.request.seeds):
            sound = originals.models.outcomes[i].sound and originals.results[i]["retain_acc"] is not None
            predictions = originals.predictions[i] if sound else None
            path = run.request.originals_path(seed)
            if sound or not has_predictions(path, run.digest):  # those of more attempts stay
                write_atomically(path, packed(predictions, run.evaluator.labels, digest=run.digest))


def _train_or_load(run: Prepared, without: int | None, reporter: Reporter) -> Models:
    request = run.request
    indices = np.arange(len(run.train.labels)) if without is None else run.split.retain
    labels = fetch(run.train.labels)[indices]
    judge = judge_of(labels, len(run.batches(len(indices), "training")), request.protocol.pretrain_epochs)

    def entry(index: int, attempt: int) -> Entry:
        seed = request.seeds[index]
        return pretrain_entry(request.cache_dir, request.protocol, run.digest, seed, without, attempt)

    def start(group: list[int]) -> Start:
        mesh = make_mesh(len(group), request.devices)
        pretraining = Pretraining(run.network, request.protocol, run.train, indices, mesh, run.timing)
        return Start(pretraining, pretraining.start)

    if without is None:
        names = [_name(run, request.originals_path(seed)) for seed in request.seeds]
    else:
        names = _names(run, next(group for group in run.groups if group.method.name == RETRAIN))
    entries = [entry(i, 0) for i in range(len(request.seeds))]
    redraw = Redraw(judge, request.attempts, entry) if judge else None
    with locked(entries):  # those of further attempts are nobody's who has not locked the first
        title = "pretrain" if without is None else RETRAIN
        told = _teller(run, names, title)
        return _to_the_end(run, start, entries, reporter, title, redraw=redraw, told=told)


def _unlearn(
    run: Prepared, group: Group, entries: Sequence[Entry], pretrained: Models, scorer: Scorer, reporter: Reporter
) -> Models:
    """Every seed's model unlearned by each method of a group: all seeds of its first draw, of its second, ..., then the
    next method's."""
    count, total = len(run.keys), run.count(group)
    if not any(own.sound for own in pretrained.outcomes):
        return repeated(pretrained, total // count, run.mesh)
    if not group.method.source:
        _discard(entries)  # nobody can say whether it is of the same rule

    def start(chosen: list[int]) -> Start:
        unlearning = run.unlearnings[group.title]
        if len(chosen) < total:
            unlearning = run.unlearning(group, make_mesh(len(chosen), run.request.devices))
        seeds = np.asarray(chosen) % count
        params, batch_stats = place_seeds(
            jax.tree.map(lambda x: x[seeds], (pretrained.params, pretrained.batch_stats)), unlearning.mesh
        )
        variants = [group.methods[i // (total // len(group.methods))].hyperparameters for i in chosen]
        numbers = {name: [own[name] for own in variants] for name in group.numbers}
        return Start(unlearning, partial(unlearning.start, params, batch_stats, numbers=numbers))

    names = _names(run, group)

    def worth(places: Sequence[int], epoch: int, state: Any) -> list[dict[str, float | None]]:
        found = scorer.on_the_way(places, state)
        for place, own in zip(places, found, strict=True):
            if run.events:
                with run.timing("checkpoint_s"):
                    run.events.add(names[place], epoch, {f"evaluated/{name}": value for name, value in own.items()})
        return found

    watch = Watch(run.request.eval_every, worth) if run.request.eval_every else None
    told = _teller(run, names, "unlearn")
    return _to_the_end(
        run, start, entries, reporter, group.title, run.request.draws(group.method), watch=watch, told=told
    )


def _unlearn_entries(run: Prepared, group: Group, pretrained: Models) -> list[Entry]:
    request = run.request
    return [
        unlearn_entry(
            request.cache_dir, request.protocol, run.digest, seed, method, max(0, own.attempts - 1), draw, group.numbers
        )
        for method, draw in itertools.product(group.methods, range(request.draws(group.method)))
        for seed, own in zip(request.seeds, pretrained.outcomes, strict=True)
    ]


def _to_the_end(
    run: Prepared,
    start: Callable[[list[int]], Start],
    entries: Sequence[Entry],
    reporter: Reporter,
    title: str,
    draws: int = 1,
    redraw: Redraw | None = None,
    watch: Watch | None = None,
    told: Told = lambda *_: None,
) -> Models:
    request, count = run.request, len(run.request.seeds)
    seeds = [(request.seeds[i % count], i // count % draws) for i in range(len(entries))]
    state, outcomes = train(start, entries, seeds, run.mesh, reporter, title, request.save_every, redraw, watch, told)
    return Models(state.params, state.batch_stats, outcomes)
