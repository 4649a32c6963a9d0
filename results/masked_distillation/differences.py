"""What each part of the rule does to the average gap, for docs/masked-distillation.md: of trials of `variants.py` in a
folder, by what was switched, the mean paired difference from the rule itself over the runs, with half its 95% interval.

$ python results/masked_distillation/differences.py results/masked_distillation/resnet20-digits-class0
"""

import sys
from pathlib import Path

from jaxunlearn.registry import get_method
from jaxunlearn.results import records
from jaxunlearn.results.statistics import paired_difference

rule = get_method(str(Path(__file__).with_name("variants.py"))).hyperparameters
gaps: dict[str, dict] = {}
for path in sorted(Path(sys.argv[1]).glob("variants-*/*.json")):
    record = records.read(path)
    changed = {name: value for name, value in record["hyperparameters"].items() if value != rule[name]}
    switched = " ".join(f"{name}={value}" for name, value in changed.items()) or "the rule"
    run = record["seed"], record["unlearn_seed"]
    gaps.setdefault(switched, {})[run] = record["companions"]["against_retrain"]["average_gap"]
for switched, own in sorted(gaps.items()):
    mean, half_width, pairs = paired_difference(own, gaps["the rule"])
    print(f"{switched:30} {sum(own.values()) / len(own):.3f}  {mean:+.3f} ± {half_width:.3f}  {pairs} pairs")
