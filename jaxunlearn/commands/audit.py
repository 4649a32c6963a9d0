"""Attack many models example by example: is the forgotten class's data still in them?

Trains N originals and N retrained models once, unlearns each original with each method, and tells the unlearned models
from the retrained ones. What is there already under OUT, with --keep-predictions of bench, is taken as it is. Results
go to stdout and to OUT/audit/<bench>/<method>-N<k>.json, progress to stderr. Exit status as of bench.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from jaxunlearn.benchmarks import BENCHMARKS
from jaxunlearn.commands.bench import INTERRUPTED
from jaxunlearn.errors import UserError, WriteError, one_line
from jaxunlearn.files import default_cache

__all__ = ["INTERRUPTED", "add_arguments", "run"]
MOST = 4096  # models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives the parser the command's arguments."""
    add = parser.add_argument
    add("--bench", required=True, metavar="NAME", help="the benchmark: " + ", ".join(BENCHMARKS))
    add("--method", required=True, nargs="+", metavar="NAME|FILE.py", help="as of bench")
    add(
        "--models",
        type=int,
        default=32,
        metavar="N",
        help="of each kind, seeds 0 to N - 1; 4 is a trial run, 64 a result (default: %(default)s)",
    )
    add("--together", type=int, default=8, metavar="G", help="seeds that train together (default: %(default)s)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="a hyperparameter (scrub.temperature=2) or a field of the protocol (protocol.pretrain_epochs=8)",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the curves as .png or .svg (needs matplotlib)")
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", type=Path, metavar="PATH", help="where the images are, as of bench")
    where.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        default=default_cache(),
        help="pretrained models, compiled programs, downloads (default: %(default)s)",
    )
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs"),
        help="records, of models and of audits (default: %(default)s)",
    )
    where.add_argument("--devices", type=int, metavar="N", help="how many devices, as of bench")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--force", action="store_true", help="overwrite models' records of other settings and better ones"
    )
    output.add_argument("--json", action="store_true", help="print one JSON line a method and nothing else")
    output.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Audits and prints. Raises UserError."""
    # Here, because JAX takes a second to import and `--help` should not.
    from jaxunlearn.audit.auditing import FEWEST, audits
    from jaxunlearn.audit.collecting import collect
    from jaxunlearn.audit.keeping import audit_path, write_audit
    from jaxunlearn.audit.showing import check_plot, plot, print_audit
    from jaxunlearn.devices.configuration import request_devices, within_memory
    from jaxunlearn.progress import Reporter
    from jaxunlearn.registry import RETRAIN
    from jaxunlearn.runs.request import Request, get_methods, make_protocol, parse_settings, settled

    if not FEWEST <= args.models <= MOST:
        raise UserError(f"--models {args.models}: from {FEWEST} to {MOST:,}")
    if args.together < 1:
        raise UserError(f"--together {args.together}: it must be at least 1")
    if args.plot:
        check_plot(args.plot)
    settings = parse_settings(args.set)
    fields = settings.pop("protocol", {})
    protocol = make_protocol(args.bench, {}, fields, None)
    methods = get_methods(args.method, settings, against_retrain=True)
    if [method.name for method in methods] == [RETRAIN]:
        raise UserError(f"--method {RETRAIN}: name a method that is to be told from it")
    request_devices(args.devices)
    request = Request(
        bench=args.bench,
        protocol=settled(protocol, fields),
        methods=methods,
        seeds=list(range(args.models)),
        out=args.out,
        cache_dir=args.cache_dir,
        data_dir=args.data_dir,
        devices=args.devices,
        force=args.force,
    )
    with within_memory():
        for warning in collect(request, args.together, Reporter(args.quiet)):
            print(f"warning: {warning}", file=sys.stderr)
    found = []
    try:
        for method, record in audits(request):
            found.append(record | {"command": _command(args, method.name)})
            write_audit(audit_path(request, method), found[-1])
            if args.json:
                print(json.dumps(found[-1]), flush=True)
        if not args.json:
            print_audit(found)
        if args.plot:
            plot(found, args.plot)
    except OSError as error:
        raise WriteError(
            f"cannot write the audit ({one_line(error)}): put that right and run the same command"
        ) from None
    return 0


def _command(args: argparse.Namespace, method: str) -> str:
    """The command of one method's audit, without folders."""
    given = next((Path(name).name for name in args.method if Path(name).stem == method), method)
    words = ["jaxunlearn", "audit", "--bench", args.bench, "--method", given, "--models", str(args.models)]
    for setting in args.set:
        words += ["--set", setting] if setting.startswith(("protocol.", f"{method}.")) else []
    return shlex.join(words)
