"""`accelerate launch` with the exit code of the training, where accelerate itself ends with 1 whatever has happened.

    python -m common.launch --config_file zero3.yaml --num_processes 8 -m srpo.train --config FILE.yaml

An experiment goes on after a crash of one training, not after a mistake in the settings (2) or a SIGTERM (143).
"""

import signal
import sys

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

MISTAKE, TOLD_TO_END = 2, 128 + signal.SIGTERM


def main(argv: list[str] | None = None) -> int:
    """Exit code of the process that failed first, 128 + N for signal N, to it or to this launcher, and as for SIGTERM
    where its terminal is lost (SIGHUP); else 0."""
    try:
        launch.launch_command(launch.launch_command_parser().parse_args(argv))
    except ChildFailedError as error:
        code = code_of(error)
        if code not in (MISTAKE, TOLD_TO_END):  # of which the training has said all
            print(error, file=sys.stderr)
        return code
    except SignalException as error:
        return TOLD_TO_END if error.sigval == signal.SIGHUP else 128 + error.sigval
    return 0


def code_of(error: ChildFailedError) -> int:
    """Not that of a process which the launcher has ended for the sake of another, unless all of them were told to."""
    codes = {rank: 128 - f.exitcode if f.exitcode < 0 else f.exitcode for rank, f in error.failures.items()}
    return codes[min(codes, key=lambda rank: (codes[rank] == TOLD_TO_END, error.failures[rank].timestamp))]


if __name__ == "__main__":
    sys.exit(main())
