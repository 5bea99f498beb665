"""Programs that `forked` runs behave as in a new interpreter."""

import os
import signal
import subprocess
import sys

import pytest

CODE = """
import atexit, json, os, sys
if __name__ == "__main__":
    atexit.register(print, "at the end")
    path = [each for each in sys.path if "planted" in each]
    threads = len(os.listdir("/proc/self/task"))
    print(json.dumps([sys.argv, os.environ["PLANTED"], os.getcwd(), sys.path[0], path, threads]))
    print(sys.modules["__main__"].CODE, file=sys.stderr)
    {end}
"""
ENDS = {"it ends": "", "it exits with 3": "sys.exit(3)", "it fails": "raise ValueError('planted')",
        "it is killed": "os.kill(os.getpid(), 9)"}  # fmt: skip


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("kind", ["-c", "-m", "file"])
def test_a_program_gets_and_gives_what_it_would_in_a_new_interpreter(forks, tmp_path, kind, end):
    text = "CODE = 'planted on stderr'\n" + CODE.replace("{end}", end)
    (tmp_path / "planted_program.py").write_text(text)
    named = {"-m": ["-m", "planted_program"], "file": [str(tmp_path / "planted_program.py")]}
    command = [*named.get(kind, ["-c", text]), "an argument", "--option"]
    environment = {"PLANTED": "yes", "PYTHONPATH": str(tmp_path / "planted"), "PATH": os.environ["PATH"]}
    options = {"env": environment, "cwd": tmp_path}
    found = forks.run(command, **options)
    wanted = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert (found.returncode, found.stdout) == (wanted.returncode, wanted.stdout)
    assert found.stderr.splitlines()[-1] == wanted.stderr.splitlines()[-1]


def test_a_program_can_be_stopped_and_waited_for(forks):
    process = forks.start(["-c", "import time; print('begun', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == process.poll() == -signal.SIGTERM
    process.kill()  # it has ended: nothing happens
    process.stdout.close()
