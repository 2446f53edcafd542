"""Ctrl-C cancels a recipe, and KeyboardInterrupt comes when it has given back what it took."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
from trio.testing import MockClock

import pipeline
from pipeline.errors import UsageError
from pipeline.interrupts import insisted, interruptible, move_on_when, run


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def handled() -> Iterator[list[int]]:
    """Somebody else has a use for it."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """Whoever has started us may have let it be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_comes_when_all_is_given_back() -> None:
    steps: list[str] = []

    @interruptible
    async def recipe() -> None:
        try:
            press()
            steps.append("not torn apart")
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
            steps.append("given back")

    with pytest.raises(KeyboardInterrupt):
        trio.run(recipe)
    assert steps == ["not torn apart", "given back"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@interruptible
async def past_its_point() -> int:
    with trio.CancelScope(shield=True):
        press()
        await trio.sleep(0.01)
    return 5


def test_what_completes_all_the_same_is_returned_first() -> None:
    seen: list[int] = []

    async def main() -> None:
        seen.append(await past_its_point())
        await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert seen == [5]


def test_what_runs_by_itself_and_completes_is_returned() -> None:
    assert run(past_its_point) == 5


def test_what_runs_by_itself_and_does_not_is_interrupted() -> None:
    async def recipe() -> None:
        press()
        await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        run(recipe)


def test_who_insists_is_heard() -> None:
    heard: list[bool] = []

    @interruptible
    async def recipe() -> None:
        with trio.CancelScope(shield=True):
            for _ in range(2):
                press()
                await trio.sleep(0.01)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask)

    async def ask() -> None:
        heard.append(insisted())

    run(recipe)
    assert heard == [False, True]
    assert not insisted()


def test_of_recipes_side_by_side_all_are_cancelled() -> None:
    """Also by what is pressed when the first of them is done already."""
    given_back: list[str] = []

    @interruptible
    async def recipe(name: str, seconds: float) -> None:
        try:
            await trio.sleep(seconds)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
            given_back.append(name)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recipe, "short", 0.01)
            nursery.start_soon(recipe, "long", math.inf)
            nursery.start_soon(recipe, "as long", math.inf)
            await trio.sleep(0.1)
            press()

    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main)
    assert {type(one) for one in caught.value.exceptions} == {KeyboardInterrupt}
    assert given_back[0] == "short"
    assert sorted(given_back[1:]) == ["as long", "long"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_within_another_that_one_is_cancelled() -> None:
    inner = interruptible(trio.sleep_forever)
    seen: list[BaseException] = []

    @interruptible
    async def outer() -> None:
        press()
        try:
            await inner()
        except BaseException as error:
            seen.append(error)
            raise

    with pytest.raises(KeyboardInterrupt):
        trio.run(outer)
    assert [type(error) for error in seen] == [trio.Cancelled]


def test_its_error_comes_as_itself() -> None:
    @interruptible
    async def recipe() -> None:
        async with trio.open_nursery():
            raise UsageError("not so")

    with pytest.raises(UsageError, match="not so"):
        trio.run(recipe)


def test_its_error_comes_as_itself_beside_what_was_cancelled() -> None:
    @interruptible
    async def recipe() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            with trio.CancelScope(shield=True):
                press()
                await trio.sleep(0.01)
            raise UsageError("not so")

    with pytest.raises(UsageError, match="not so"):
        trio.run(recipe)


def test_it_can_be_cancelled_from_outside() -> None:
    async def main() -> bool:
        with trio.move_on_after(0.01) as scope:
            await interruptible(trio.sleep_forever)()
        return scope.cancelled_caught

    assert trio.run(main)


def test_who_has_another_use_for_it_keeps_it() -> None:
    @interruptible
    async def recipe() -> int:
        press()
        await trio.sleep(0.01)
        return 5

    with handled() as seen:
        assert trio.run(recipe) == 5
        assert seen == [signal.SIGINT]


def test_in_another_thread_nobody_hears_of_it() -> None:
    async def main() -> int:
        return await trio.to_thread.run_sync(trio.run, interruptible(five))

    async def five() -> int:
        return 5

    assert trio.run(main) == 5


@pytest.mark.parametrize(
    "recipe",
    [pipeline.dump, pipeline.restore, pipeline.migrate, pipeline.serve],
    ids=lambda one: one.__name__,
)
def test_every_recipe_is_so(recipe: object) -> None:
    assert recipe.__code__ is interruptible(recipe).__code__  # type: ignore[attr-defined,arg-type]


def _soon() -> Callable[[], bool]:
    """False twice, and then True."""
    answers = iter((False, False))
    return lambda: next(answers, True)


def test_a_block_is_left_when_that_is_said() -> None:
    async def main() -> float:
        async with move_on_when(_soon()):
            await trio.sleep_forever()
        return trio.current_time()

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) < 1


def test_what_a_block_returns_is_returned_though_that_is_said_just_then() -> None:
    async def main() -> str:
        async with move_on_when(lambda: True):
            return "done"
        return "left"

    assert {trio.run(main) for _ in range(20)} == {"done"}


def test_an_error_of_a_block_comes_as_itself() -> None:
    async def main() -> None:
        async with move_on_when(_soon()):
            await trio.sleep(0.01)
            raise UsageError("not so")

    with pytest.raises(UsageError, match="not so"):
        trio.run(main)
