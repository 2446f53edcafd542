"""A recipe under signals: cancelled, rolled back, and the exit code says by which."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cancels_and_waits_for_the_roll_back(number: signal.Signals, code: int) -> None:
    program = """
        import sys, trio
        from pipeline.cli import recipe

        async def work():
            try:
                print("working", flush=True)
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.05)
                    print("rolled back", flush=True)

        recipe.run(work)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == "rolled back\n"
    assert err == f"cancelling on {number.name}: rolling back, unless it is too late for that\n"


def test_a_recipe_past_its_point_of_no_return_completes() -> None:
    program = """
        import trio
        from pipeline.cli import recipe

        async def work():
            with trio.CancelScope(shield=True):
                print("working", flush=True)
                await trio.sleep(0.3)
            return "done"

        print(recipe.run(work), flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "done\n")


def test_what_is_done_is_told_whoever_presses_then() -> None:
    """Also while Trio ends its loop."""
    program = """
        import os, signal, sys, trio
        from pipeline.cli import recipe

        class Last(trio.abc.Instrument):
            def after_run(self):
                os.kill(os.getpid(), signal.SIGINT)

        async def work():
            trio.lowlevel.add_instrument(Last())
            return "done"

        print(recipe.run(work, deaf_then=sys.argv[1] == "deaf"), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    """
    for how, expected in (("deaf", (0, "done\n")), ("as ever", (-signal.SIGINT, ""))):
        command = [sys.executable, "-c", textwrap.dedent(program), how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == expected, done.stderr


def test_one_error_comes_out_of_its_groups() -> None:
    import trio

    from pipeline.cli import recipe
    from pipeline.errors import TargetError

    async def fail() -> None:
        raise TargetError("gone")

    async def work() -> None:
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            inner.start_soon(fail)
            outer.start_soon(trio.sleep, 0)

    with pytest.raises(TargetError, match="gone"):
        recipe.run(work)
