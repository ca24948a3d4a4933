import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsda_fast.errors import Stopped
from gsda_fast.training import stopping
from gsda_fast.training.stopping import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    """A test that fails must not leave its handlers to others."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_does_no_more(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    request = StopRequest()
    with request.listening() as stop:
        assert stop is request
        assert not stop()
        signal.raise_signal(number)
        assert stop()
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_signals_that_follow_at_once_say_the_same() -> None:
    with StopRequest().listening() as stop:
        for number in (*SIGNALS, *SIGNALS):
            signal.raise_signal(number)
        assert stop()


def test_one_that_comes_later_is_what_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.05)
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    with StopRequest().listening() as stop:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.06)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


def test_what_is_interruptible_ends_at_once() -> None:
    request, steps = StopRequest(), []

    def work() -> None:
        steps.append("begun")
        signal.raise_signal(signal.SIGTERM)
        steps.append("ended")

    with request.listening():
        assert request.interruptible(lambda: "done")() == "done"
        with pytest.raises(Stopped):
            request.interruptible(work)()
        # Asked before it begins, it does not begin.
        with pytest.raises(Stopped):
            request.interruptible(work)()
    assert steps == ["begun"]


def test_nothing_else_is_interrupted() -> None:
    with StopRequest().listening() as stop:
        stop.interruptible(lambda: None)()
        signal.raise_signal(signal.SIGTERM)
        assert stop()


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopRequest().listening() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_thread_leaves_signals_alone() -> None:
    seen = []

    def work() -> None:
        with StopRequest().listening():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# A suite whose one run waits in its sixth step until it is asked to stop.
SUITE = """
import sys, time
from gsda_fast.commands import run_command
from gsda_fast.training.trainer import Trainer

step = Trainer._train_step
def waiting(self, number, batch):
    if number == 5:
        print("in step 6", flush=True)
        while not self._stop():
            time.sleep(0.02)
    return step(self, number, batch)
Trainer._train_step = waiting

if __name__ == "__main__":
    from gsda_fast.suite import main
    run_command(main)
"""


def test_an_interrupted_suite_lets_its_runs_stop_in_good_order(few_digits: Path, tmp_path: Path) -> None:
    (tmp_path / "suite.py").write_text(SUITE)
    options = ["--steps", "12", "--warmup", "4", "--refresh-every", "3", "--batch-size", "8", "--jobs", "1"]
    options += ["--tasks", "F->O", "--seeds", "0", "--methods", "dann", "gsda"]
    command = [sys.executable, str(tmp_path / "suite.py"), "digits", *options, "--data-root", str(few_digits)]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path / "suite")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        assert any("in step 6" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted: 0 of 2 runs have finished; the same command goes on with the others"
    # The second run has not begun.
    (run,) = (path for path in (tmp_path / "suite").iterdir() if path.is_dir())
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["step-00000004.pt", "step-00000007.pt"]
