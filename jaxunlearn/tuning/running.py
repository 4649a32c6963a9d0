"""Tuning: each method's variants run as methods of one run, and a method's file after each variant."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxunlearn.devices.processes import all_or_none, from_leader, leads
from jaxunlearn.files import LOCK_REMEDY, acquire, make_lock
from jaxunlearn.progress import Reporter
from jaxunlearn.registry import RETRAIN, get_method
from jaxunlearn.runs.preparation import prepare
from jaxunlearn.runs.request import Request
from jaxunlearn.runs.running import results
from jaxunlearn.tuning.studies import Study, check_images, resumed, save, with_trial


def tune(
    request: Request, studies: Sequence[Study], reporter: Reporter, force: bool, warn: Callable[[str], None]
) -> list[Study]:
    """Tries what is pending of every study, beside one retrained model a seed, and writes each study's file as it goes.

    Args:
      request: what all have in common; its methods are taken from the studies.
      force: begin anew where a study's file is of other settings.
      warn: told what was not written.

    Raises:
      UserError: for whatever is wrong with the request, or where a file is of other settings or images.
      KeyboardInterrupt: the run was interrupted; the same call goes on from there.
    """
    with all_or_none():
        known = [resumed(study, force).content if leads() else {} for study in studies]
    contents = json.loads(from_leader(json.dumps(known).encode()))
    found = [study._replace(content=content) for study, content in zip(studies, contents, strict=True)]
    pending = [variant for study in found for variant in study.pending]
    if not pending:
        return found
    places = {study.method.name: number for number, study in enumerate(found)}
    together: dict[str, list[dict[str, Any]]] = {}
    run = prepare(dataclasses.replace(request, methods=[get_method(RETRAIN), *pending], once=True), reporter)
    for study in found:
        check_images(study, run.digest)
    for record, kept in results(run):
        if kept:
            warn(kept)
        if record["method"] == RETRAIN:
            continue
        number = places[record["method"]]
        own = together.setdefault(json.dumps([number, record["hyperparameters"]], sort_keys=True), [])
        own.append(record)
        if leads() and len(own) == len(request.seeds) * request.draws(found[number].method):
            with _alone_with(found[number], request):
                now = resumed(found[number], force=False)  # with what others have tried since
                check_images(now, run.digest)
                found[number] = with_trial(now, own)
                save(found[number])
    return found


@contextmanager
def _alone_with(study: Study, request: Request) -> Iterator[None]:
    """While no other process with the same cache reads and writes the study's file."""
    key = hashlib.sha256(str(study.path.resolve()).encode()).hexdigest()[:16]
    lock = make_lock(request.cache_dir / "locks" / f"tuning-{key}.lock")
    acquire(lock, -1, LOCK_REMEDY)
    try:
        yield
    finally:
        lock.release()
