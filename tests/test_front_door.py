"""What every front door does with the errors of its work."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from errors import run_front_door

def work():
    {}

sys.exit(run_front_door(work, debug=False))
"""


def test_a_reader_that_has_enough_ends_the_program_without_a_traceback() -> None:
    for work in ("print('x', flush=True)", "print('x')"):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-c", PROGRAM.format(work)]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "stopped: nobody reads the output any more\n"), work


def test_another_pipe_that_breaks_is_not_taken_for_the_output() -> None:
    command = [sys.executable, "-c", PROGRAM.format("raise BrokenPipeError(32, 'Broken pipe')")]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: [Errno 32] Broken pipe\n")
