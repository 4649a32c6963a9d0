"""Runs in bfloat16 beside those of the same protocol in float32, for docs/speed.md: whether each quantity could be that
of one more seed in float32, by the 95% prediction interval of its seeds.

$ python results/bf16/compare.py
"""

from pathlib import Path

from jaxunlearn.results import records
from jaxunlearn.results.published import agreement

HERE = Path(__file__).parent
QUANTITIES = ("retain_acc", "forget_acc", "forget_mia_auc", "unlearn_score")

print("| | quantity | bf16 | fp32 | s | difference | allowed | agrees |\n|---|---|---|---|---|---|---|---|")
for path in sorted(HERE.glob("*/*/seed42.json")):
    half = records.read(path)
    folder = HERE.parent / half["bench"] / half["method"]
    whole = [records.read(file) for file in sorted(folder.glob("*.json"))]
    if not whole:
        continue
    for quantity in QUANTITIES:
        found = agreement([record[quantity] for record in whole], half[quantity], 4)
        numbers = found.mean, found.std, -found.difference, found.allowed
        cells = " | ".join(f"{number + 0.0:.4f}" for number in numbers)  # no minus before zero
        print(f"| {half['method']} | {quantity} | {half[quantity]:.4f} | {cells} | {'yes' if found.agrees else 'no'} |")
