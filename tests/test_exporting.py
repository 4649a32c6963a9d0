"""Runs from given weights, and the weights that runs leave."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_runs import BENCH, DIGITS, QUIET, request_of, results, tiny_bench

from jaxunlearn.errors import UserError
from jaxunlearn.evaluation.metrics import METRICS
from jaxunlearn.models import torch_weights
from jaxunlearn.models.network import make_network
from jaxunlearn.runs import running
from jaxunlearn.runs.preparation import prepare
from jaxunlearn.training.pretraining import Pretraining

__all__ = ["tiny_bench"]  # a fixture
pytestmark = [pytest.mark.usefixtures("tiny_models"), pytest.mark.slow]


def test_given_weights_replace_pretraining(tmp_path, monkeypatch):
    params, batch_stats = make_network(DIGITS, 10).initialise(jax.random.key(5))
    np.savez(tmp_path / "w.npz", **torch_weights.to_state_dict({"params": params, "batch_stats": batch_stats}))
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("trained"))
    request = request_of(tmp_path, seeds=(1, 2), init_weights=tmp_path / "w.npz")
    with pytest.raises(UserError, match="SHA-256 in the protocol go together"):  # without it, runs could be mixed up
        prepare(request, QUIET)
    request = dataclasses.replace(request, protocol=dataclasses.replace(DIGITS, init_weights="its hash"))
    first, second = results(request)
    same = [name for name in METRICS if "augmented" not in name]  # which is drawn by the seed
    assert [first["before"][name] for name in same] == [second["before"][name] for name in same]
    assert first["timing"]["pretrain_s"] == 0 and first["curves"]["pretrain"] is None
    assert first["throughput"]["pretrain_images_per_s"] is None
    assert not (tmp_path / "cache" / "pretrained").exists()


def test_weights_are_written_beside_a_record_that_is_kept(tmp_path):
    (longer,) = results(request_of(tmp_path, evaluate="full"))
    folder = tmp_path / "weights"
    run = prepare(request_of(tmp_path, export_weights=folder, keep_predictions=True), QUIET)
    ((_, warning),) = running.results(run)
    record = run.request.path_of(longer)
    assert (
        json.loads(record.read_text()) == json.loads(json.dumps(longer))
        and len(list(folder.rglob("*.safetensors"))) == 1
    )
    lost = record.with_suffix(".npz")
    assert warning == f"{record} holds a better record, kept, and {lost} was not written; --force replaces it"
    (file,) = folder.rglob("*.safetensors")
    file.write_bytes(b"of the record that is kept")
    ((_, warning),) = running.results(prepare(run.request, QUIET))
    assert file.read_bytes() == b"of the record that is kept"
    assert (
        warning == f"{record} holds a better record, kept, and {lost} and {file} was not written; --force replaces it"
    )


def test_exported_weights_give_the_model_that_was_exported(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    exported = results(request_of(tmp_path, method="scrub retrain", seeds=(1, 2), export_weights=folder))
    records = {path.relative_to(tmp_path / "runs").with_suffix("") for path in tmp_path.glob("runs/*/*/*.json")}
    files = {path.relative_to(folder).with_suffix("") for path in folder.glob("*/*/*.safetensors")}
    assert len(files) == 4 and files == records
    monkeypatch.setattr(Pretraining, "epoch", lambda *_: pytest.fail("trained"))
    for record in exported:
        weights = folder / BENCH / record["method"] / f"seed{record['seed']}.safetensors"
        protocol = dataclasses.replace(DIGITS, init_weights="its hash", unlearn_epochs=1)
        (again,) = results(request_of(tmp_path, seeds=(record["seed"],), protocol=protocol, init_weights=weights))
        assert {name: again["before"][name] for name in METRICS} == {name: record[name] for name in METRICS}
