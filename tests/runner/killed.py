"""`python killed.py FILE UNDISTURBED KILLED UNIT…`: runs the pipeline in FILE below the folder UNDISTURBED, and then
below KILLED in processes of which each kills itself with SIGKILL as soon as the next UNIT is done, and the last one
comes to its end. Prints how each ended.

The processes are forked from one that has imported what they need, knows fonts, and has one thread.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

from matplotlib.figure import Figure

from compress.models.load import load_model, load_tokenizer
from compress.pipeline.check import valid_pipeline
from compress.runner.run import run_pipeline
from compress.stage import Reporter
from compress.units import Unit, Units


def die_after(last: str) -> None:
    """Arrange it."""
    keep = Units.keep

    def keep_and_die(units: Units, name: str, unit: Unit) -> None:
        keep(units, name, unit)
        if f"{units.what} {name}" == last:
            os.kill(os.getpid(), signal.SIGKILL)

    Units.keep = keep_and_die  # type: ignore[method-assign]


def main(file: Path, undisturbed: Path, killed: Path, *units: str) -> None:
    model = Path(valid_pipeline(file).model)
    load_model(model), load_tokenizer(model)  # what they all would do again
    figure = Figure(layout="constrained")
    figure.subplots().set_yscale("log")
    figure.savefig(io.BytesIO())
    for runs, last in ((undisturbed, None), *((killed, unit) for unit in units), (killed, None)):
        if (process := os.fork()) == 0:
            if last is not None:
                die_after(last)
            run_pipeline(valid_pipeline(file), runs=runs, reporter=Reporter(), twin=False)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
