"""Write constraints.txt, and the same pins into pyproject.toml (uv reads only the latter for `uv run`).

Run by hand when dependencies should move: ``python pins.py``. Names and versions only; no lock file is kept.
"""

import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).parent
BLOCK = re.compile(r"constraint-dependencies = \[.*?^\]\n", re.DOTALL | re.MULTILINE)
EXPORT = ["uv", "export", "--quiet", "--no-hashes", "--no-header", "--no-annotate", "--no-emit-workspace"]


def main() -> None:
    (ROOT / "uv.lock").unlink(missing_ok=True)  # a stale one would keep old versions
    project = ROOT / "pyproject.toml"
    text = project.read_text()
    project.write_text(BLOCK.sub("constraint-dependencies = [\n]\n", text))
    command = [*EXPORT, "--all-groups", "--all-extras"]
    pins = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (ROOT / "constraints.txt").write_text(pins)
    lines = "".join(f'    "{pin}",\n' for pin in pins.splitlines())
    project.write_text(BLOCK.sub(lambda _: f"constraint-dependencies = [\n{lines}]\n", text))


main()
