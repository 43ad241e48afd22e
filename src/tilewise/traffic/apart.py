"""A function in a process whose Triton kernels are interpreted: Triton reads TRITON_INTERPRET when a kernel is decorated.

    python -m tilewise.traffic.apart FUNCTION ARGUMENTS      of `counts.py`; JSON in, JSON out
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}      # numpy on tiles: threads would only wait for each other


def apart(function: str, **arguments: Any) -> Any:
    """What a function of `counts.py` returns. Raises RuntimeError with the last line of what went wrong there."""
    from tilewise.backends.triton import missing

    if missing() is not None:
        raise RuntimeError(f"counting runs the Triton kernels in Triton's interpreter: {missing()}")
    done = subprocess.run([sys.executable, "-m", __name__, function, json.dumps(arguments)], capture_output=True, text=True,
                          env=os.environ | THREADS | {"TRITON_INTERPRET": "1"})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else ""
        raise RuntimeError(said.partition("Error: ")[2] or said or f"the counting process ended with status {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    from tilewise.traffic import counts

    function, arguments = sys.argv[1:]
    print(json.dumps(getattr(counts, function)(**json.loads(arguments))))


if __name__ == "__main__":
    main()
