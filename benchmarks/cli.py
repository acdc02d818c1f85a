"""Time of the commands that must be quick, beside a bare interpreter: ``python benchmarks/cli.py``.

Last figures (2 cores, Python 3.11): see ``cli.md``.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 11
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "certbench --help": ["-m", "certbench", "--help"],
    "certbench run --help": ["-m", "certbench", "run", "--help"],
    "certbench list methods": ["-m", "certbench", "list", "methods"],
    "certbench list recipes": ["-m", "certbench", "list", "recipes"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    print("| command | median s |\n|---|---|")
    for name, values in seconds.items():
        print(f"| `{name}` | {statistics.median(values):.2f} |")


main()
