"""What `import nemotron_h` costs over what a script with transformers pays anyway. The bound is 0.3 s.

Fresh processes, the two in turns; the medians, their difference and their ratio are printed and written as JSON.

    python benchmarks/import_time.py [--rounds 9] [--output benchmarks/results/import_time.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

PEER = "from transformers import AutoModelForCausalLM, PreTrainedModel"
OURS = f"{PEER}; import nemotron_h"


def seconds(statement: str) -> float:
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "import_time.json")
    arguments = parser.parse_args()
    for statement in (PEER, OURS):  # once for the disk cache and the bytecode
        seconds(statement)
    rounds = [(seconds(PEER), seconds(OURS)) for _ in range(arguments.rounds)]
    peer, ours = (statistics.median(times) for times in zip(*rounds, strict=True))
    # Of the pairs, not of the medians: a machine that slows down during the run slows both of a pair.
    difference = statistics.median(ours - peer for peer, ours in rounds)
    figures = {"transformers": peer, "with_nemotron_h": ours, "difference": difference, "ratio": ours / peer}
    print(f"transformers {peer:.3f} s, with nemotron_h {ours:.3f} s: {difference:+.3f} s, ratio {ours / peer:.3f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({**figures, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
