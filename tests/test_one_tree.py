"""One tree, never two, never none: both recipes over a network that cuts, swallows and refuses, on a clock that jumps.

The engine is replaced by a world that knows where the tree runs; migrate, serve, the channel and the tables
of the protocol are the real ones. Hypothesis chooses what becomes of each connection, byte by byte.
"""

from __future__ import annotations

import errno
import importlib
import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import arriving
from pipeline.errors import ImageError, InDoubt, PeerError, PipelineError
from pipeline.image.frames import PageRun
from pipeline.image.schema import End
from pipeline.ledger import LEDGER
from pipeline.migrate import Mode
from pipeline.progress import NullProgress
from pipeline.stages import borrowing, fill
from pipeline.stages.rebuild import Terms
from pipeline.transport.buffers import BufferPool
from pipeline.transport.protocol import AnyMessage, Begin, Prepared
from pipeline.transport.tcp import Channel

source_recipe = importlib.import_module("pipeline.migrate")  # the package gives the function under this name
destination_recipe = importlib.import_module("pipeline.serve")

#: what the kernel does to a connection whose other side is silently gone (tcp.notice_silence)
SILENCE_S = 60.0
#: how long somebody waits for a destination that lacks pages
PATIENCE_S = 5000.0


@dataclass(frozen=True)
class Fate:
    """What becomes of a connection after so many bytes in a direction: reset at once, or silence and then reset."""

    how: Literal["fine", "cut", "silence", "refused"]
    direction: Literal["there", "back"] = "there"
    after_bytes: int = 0


FATES = st.one_of(
    st.just(Fate("fine")),
    st.just(Fate("refused")),
    st.builds(
        Fate, st.sampled_from(["cut", "silence"]), st.sampled_from(["there", "back"]), st.integers(0, 400)
    ),
)


@dataclass
class World:
    """Where the tree is."""

    source_runs: bool = True
    there: Literal["nothing", "stands", "runs"] = "nothing"
    #: the source has waited for its end, and has to before the tree runs there
    has_ended: bool = False
    is_waited_for: bool = False
    #: that goes wrong
    end_fails: bool = False
    messages: list[str] = field(default_factory=list)

    def check(self) -> None:
        assert not (self.source_runs and self.there == "runs"), "two"
        assert self.source_runs or self.there != "nothing", "none"

    def kill(self) -> None:
        self.source_runs = False
        self.check()

    def end(self) -> None:
        self.kill()
        self.has_ended = True
        if self.end_fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    root_pid = child_pid = 77
    notes = ()

    def take_watched(self) -> list[Any]:
        return []

    def victims(self) -> list[int]:
        return []

    def place_of(self, _: int) -> int:
        return -1

    lacks_files = False
    runs_since_s = 0.0

    def make_threads(self) -> None:
        assert self.there == "stands"

    def update(self, _: object) -> bool:
        return True

    def equip_early(self, _is_enough: object) -> bool:
        assert self.there == "stands"
        return True

    def complete(self) -> None:
        assert self.there == "stands"

    def thaw(self) -> int:
        assert self.there == "stands"
        assert self.has_ended or not self.is_waited_for
        self.there = "runs"
        self.check()
        return 77


class _Tracer:
    async def run(self, act: Callable[..., Any], *args: Any) -> Any:
        await trio.lowlevel.checkpoint_if_cancelled()
        await trio.lowlevel.cancel_shielded_checkpoint()
        if getattr(act, "__name__", "") == "end":  # a killed tree takes a while to end
            await _uninterrupted()
        result = act(*args)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return result


@asynccontextmanager
async def _tracer_thread() -> AsyncIterator[_Tracer]:
    yield _Tracer()


async def _uninterrupted() -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(0.1)


class _SlowToHear(Channel):
    """The destination is prepared for a while before the source decides."""

    async def hear(self) -> AnyMessage:
        message = await super().hear()
        if isinstance(message, Prepared):
            await _uninterrupted()
        return message


class Network:
    """Connections from the source to the server, each with its fate; those beyond the list are fine, or refused."""

    def __init__(
        self,
        fates: Sequence[Fate],
        server: Any,
        serving: trio.Nursery,
        nursery: trio.Nursery,
        world: World,
        comes_back: bool,
    ) -> None:
        self._fates = list(fates)
        self._last = Fate("fine" if comes_back else "refused")
        self._server, self._serving, self._nursery, self._world = server, serving, nursery, world
        #: somebody listens
        self.is_there = True

    @asynccontextmanager
    async def connect(self, *_: Any, **__: Any) -> AsyncIterator[Channel]:
        fate = self._fates.pop(0) if self._fates else self._last
        if fate.how == "refused" or not self.is_there:
            raise PeerError("nobody listens")
        end_here, wire_here = trio.testing.memory_stream_pair()
        end_there, wire_there = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._wire, fate, wire_here, wire_there)
        self._serving.start_soon(self._answer, end_there)
        try:
            yield _SlowToHear(end_here, "source", "there")
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(end_here)

    async def _answer(self, stream: trio.abc.Stream) -> None:
        try:
            await self._server.handle(Channel(stream, "destination", "here"))
        except PeerError:
            pass
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
                self._world.check()

    async def _wire(self, fate: Fate, near: Any, far: Any) -> None:
        async with trio.open_nursery() as nursery:
            broken = trio.Event()

            async def carry(direction: str, source: Any, sink: Any) -> None:
                left = fate.after_bytes if fate.how != "fine" and fate.direction == direction else math.inf
                try:
                    while data := await source.receive_some(64):
                        passed = data[: int(min(left, len(data)))]
                        left -= len(passed)
                        if passed:
                            await sink.send_all(passed)
                        if left <= 0:
                            if fate.how == "silence":
                                await trio.sleep(SILENCE_S)
                            break
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                broken.set()

            nursery.start_soon(carry, "there", near, far)
            nursery.start_soon(carry, "back", far, near)
            await broken.wait()
            for stream in (near, far):
                await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()


class Guard:
    """Nobody has to be watched over: no page is ever missing in this world."""

    lives = True

    def hold(self, _: Any) -> None:
        """Nothing."""

    watch_over = hold

    def dismiss(self) -> None:
        """Nothing."""

    alarm = dismiss


def play(
    patch: pytest.MonkeyPatch,
    fates: Sequence[Fate],
    comes_back: bool,
    cancel_at_s: float | None = None,
    streams: int = 1,
    mode: Mode = "stop",
    end_at_s: float | None = None,
    word_at_s: float | None = None,
    is_waited_for: bool = False,
    end_fails: bool = False,
) -> tuple[World, BaseException | None, int]:
    """One migration in such a network; the world afterwards, how it ended, and how many trees are in doubt.

    Args:
        fates: of the connections, in their order.
        comes_back: those behind them are fine.
        cancel_at_s: `migrate` is cancelled then.
        streams, mode: of the migration.
        end_at_s: `serve` is cancelled then, by somebody who settles nothing that is in doubt.
        word_at_s: a person says then that what is in doubt shall run at the destination.
        is_waited_for: the tree has to have ended at its source before it runs at the destination.
        end_fails: its end goes wrong, in a way that nobody has thought of.
    """
    world = World(is_waited_for=is_waited_for, end_fails=end_fails)
    ended: list[BaseException | None] = [None]

    @asynccontextmanager
    async def standstill(*_: Any, **__: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(
            records=(), translated=tuple, sources=(), forest=None, processes=1, injected_calls=0,
            begun_s=0.0, frozen_s=0.0, captured_s=0.0,
            end=world.end, kill=world.kill, let_go_of_files=_uninterrupted, prepare_end=nothing,
            end_may_be_seen=is_waited_for,
            holdings=SimpleNamespace(settled=lambda: None, complaints=[]),
        )  # fmt: skip

    async def write_pages(writer: Any) -> None:
        for number in range(5 if streams > 1 else 0):
            await writer.pages(PageRun(1, [(number << 12, 4096)], memoryview(bytes(4095) + b"x")))

    async def write_image(writer: Any, *_: Any, **__: Any) -> int:
        await write_pages(writer)
        await writer.end(0, 0)
        return 0

    async def read_to_end(reader: Any) -> None:
        while not isinstance(item := await reader.next(), End):
            if item is None:
                raise ImageError("the image is cut")
            item.lease.release()

    class EmptyImage:
        shared_memory = contents = ()

        def check_machine(self, _: str) -> None:
            pass

        def check_references(self) -> None:
            pass

        def records(self) -> tuple[()]:
            return ()

    async def read_records(reader: Any) -> tuple[Any, None]:
        await read_to_end(reader)
        return EmptyImage(), None

    async def bring_up_to_date(_rebuilding: Any, _image: Any, feed: Any, *_: Any) -> None:
        await read_to_end(feed.reader)

    @asynccontextmanager
    async def rebuilt(*_: Any, **__: Any) -> AsyncIterator[Any]:
        await trio.sleep(0.1)
        world.there = "stands"
        try:
            yield world
        finally:
            if world.there == "stands":
                world.there = "nothing"
                world.check()

    async def nothing(*_: Any) -> None:
        await trio.lowlevel.checkpoint()

    class LiveSource:
        """Two drafts, with a round each, and the rest; without records, and without pages on one connection."""

        looks, notes, rounds_done, draft_s, begun_s, page_bytes = None, (), 2, 0.0, 0.0, 0
        later = True
        throttle = SimpleNamespace(set=nothing, run=trio.sleep_forever, most_percentage=0, held_s=0.0)

        def __init__(self, _tracer: Any, _pid: Any, channel: Channel, *_: Any) -> None:
            self._channel = channel

        async def send_rounds(self) -> None:
            for _ in range(2):
                await self._send("draft")
                await trio.sleep(0.1)
                await self._channel.say(Begin("round"))
                await write_pages(self._channel.writer)

        async def send_rest(self, _still: Any, _lasting: Any) -> list[Any]:
            await self._channel.say(Begin("still"))
            await self._send("rest")
            return []

        async def _send(self, what: Literal["draft", "rest"]) -> None:
            await self._channel.say(Begin(what))
            await write_image(self._channel.writer)

        def close(self) -> None:
            pass

    for module, names in (
        (
            source_recipe,
            {
                "standstill": standstill, "write_image": write_image, "refuse_early": nothing,
                "tracer_thread": _tracer_thread, "freeze": SimpleNamespace(walk=lambda _: [1]), "warm": nothing,
                "identity": SimpleNamespace(load_secret=lambda _: b""), "LiveSource": LiveSource,
                "large_memories": lambda *_: (),
            },
        ),
        (
            arriving,
            {
                "read_records": read_records, "read_counted": nothing, "Image": EmptyImage,
                "rebuilt": rebuilt, "grown": rebuilt, "bring_up_to_date": bring_up_to_date,
                "page_feed": lambda reader, *_: SimpleNamespace(bytes_done=0, reader=reader),
            },
        ),
        (
            destination_recipe,
            {
                "check_here": lambda: None,
                "RestoredTree": lambda *_: SimpleNamespace(wait=nothing, close=lambda: None, notes=[]),
            },
        ),
        (borrowing, {"Guard": Guard}),
        (BufferPool, {"warm": nothing}),
        (fill, {"write_run": lambda *_: None}),
    ):  # fmt: skip
        for name, value in names.items():
            patch.setattr(module, name, value)

    async def in_this_thread(work: Callable[..., Any], *args: Any) -> Any:
        """The clock would jump while a thread works."""
        await trio.lowlevel.checkpoint()
        return work(*args)

    patch.setattr(trio.to_thread, "run_sync", in_this_thread)

    async def main() -> tuple[World, int]:
        given_up = trio.Event()

        async def lose_patience() -> None:
            await trio.sleep(PATIENCE_S)
            given_up.set()

        async with trio.open_nursery() as nursery, trio.open_nursery() as serving:
            server = destination_recipe._Server(
                _Tracer(),
                Terms(),
                NullProgress(),
                lambda _: None,
                world.messages.append,
                trio.Event(),
                serving,
            )  # type: ignore[arg-type]
            network = Network(fates, server, serving, nursery, world, comes_back)

            async def end_serve(at_s: float) -> None:
                await trio.sleep(at_s)
                if not any(held.in_doubt for held in server._held.values()):
                    await server.wind_down(lambda: False)
                    network.is_there = False
                    serving.cancel_scope.cancel()

            async def say_word(at_s: float) -> None:
                await trio.sleep(at_s)
                server.decide_all(committed=True)

            if word_at_s is not None:
                nursery.start_soon(say_word, word_at_s)
            if end_at_s is not None:
                nursery.start_soon(end_serve, end_at_s)
            patch.setattr(source_recipe, "connect", network.connect)
            with trio.CancelScope(shield=True) as scope:
                if cancel_at_s is not None:
                    scope.deadline = trio.current_time() + cancel_at_s
                try:
                    nursery.start_soon(lose_patience)
                    await source_recipe.migrate(
                        1, "there:1", secret_file="", streams=streams, mode=mode, give_up=given_up.is_set
                    )
                except (PipelineError, OSError) as error:
                    ended[0] = error
            if scope.cancelled_caught:
                ended[0] = KeyboardInterrupt()
            with trio.CancelScope(shield=True):
                await trio.sleep(10 * SILENCE_S)
            world.check()
            found = replace(world)  # ending serve gives up what is in doubt: that is a person's decision
            world.source_runs = True
            held = len(server._held)
            nursery.cancel_scope.cancel()
        return found, held

    found, held = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return found, ended[0], held


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fates=st.lists(FATES, max_size=5),
    comes_back=st.booleans(),
    cancel_at_s=st.none() | st.floats(0, 1) | st.floats(0, 200),
    end_at_s=st.none() | st.floats(0, 1) | st.floats(0, 200),
    how=st.sampled_from(
        [(1, "stop"), (1, "precopy"), (1, "postcopy"), (1, "hybrid"), (2, "stop"), (4, "stop")]
    ),
    is_waited_for=st.booleans(),
)
def test_one_tree_whatever_the_network_does(
    fates: list[Fate],
    comes_back: bool,
    cancel_at_s: float | None,
    end_at_s: float | None,
    how: tuple[int, Mode],
    is_waited_for: bool,
) -> None:
    before = LEDGER.held()
    with pytest.MonkeyPatch.context() as patch:
        world, error, held = play(
            patch, fates, comes_back, cancel_at_s, *how, end_at_s, is_waited_for=is_waited_for
        )
    assert LEDGER.held() == before
    assert world.has_ended != world.source_runs
    if error is None:
        assert not world.source_runs
        assert (world.there, held) == ("runs", 0)
    elif isinstance(error, InDoubt):
        assert not world.source_runs
        assert world.there == "runs" or held == 1
    elif world.source_runs:
        # whoever could be told holds nothing
        assert (world.there, held) == ("nothing", 0) or not comes_back
    else:
        pytest.fail("cancelled behind the decision")


@pytest.mark.parametrize(
    ("streams", "mode"),
    [
        (1, "stop"),
        (2, "stop"),
        (4, "stop"),
        (16, "stop"),
        (1, "precopy"),
        (3, "precopy"),
        (1, "postcopy"),
        (1, "hybrid"),
    ],
)
def test_a_fine_network_moves_the_tree(streams: int, mode: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world, error, held = play(patch, [], True, None, streams, mode)
    assert (error, held, world.there, world.source_runs) == (None, 0, "runs", False)


def test_what_goes_wrong_when_a_killed_tree_ends_stops_nobody_from_running_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        world, error, held = play(patch, [], True, end_fails=True)
    assert (held, world.there, world.source_runs) == (0, "runs", False)
    assert isinstance(error, OSError)


@pytest.mark.parametrize("how", ["cut", "silence"])
@pytest.mark.parametrize("direction", ["there", "back"])
@pytest.mark.parametrize(("mode", "bytes_in_all"), [("stop", 400), ("precopy", 1200), ("postcopy", 1700)])
def test_the_first_connection_broken_after_every_byte(
    how: Any, direction: Any, mode: Any, bytes_in_all: int
) -> None:
    ends = set()
    for after in range(0, bytes_in_all, 3):
        with pytest.MonkeyPatch.context() as patch:
            world, error, held = play(patch, [Fate(how, direction, after)], True, None, 1, mode)
        assert held == 0
        ends.add((world.source_runs, world.there))
        assert (world.there == "runs") == (error is None)
    assert ends == {(True, "nothing"), (False, "runs")}


@pytest.mark.parametrize("how", ["cut", "silence"])
@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_further_connection_broken_after_every_byte(how: Any, direction: Any) -> None:
    """A loss before all pages are there leaves the tree where it was; one behind that changes nothing."""
    ends = set()
    for after in [*range(0, 300, 5), *range(300, 9000, 431)]:
        with pytest.MonkeyPatch.context() as patch:
            world, error, held = play(patch, [Fate("fine"), Fate(how, direction, after)], True, None, 3)
        assert held == 0
        ends.add((world.source_runs, world.there))
        assert (world.there == "runs") == (error is None)
    assert ends <= {(True, "nothing"), (False, "runs")}
    assert (True, "nothing") in ends


@pytest.mark.parametrize("who", ["migrate", "serve"])
@pytest.mark.parametrize(
    ("streams", "mode"), [(1, "stop"), (3, "stop"), (1, "precopy"), (1, "postcopy"), (1, "hybrid")]
)
def test_either_side_cancelled_in_every_moment(streams: int, mode: Any, who: str) -> None:
    """What only one side can bring to its end is brought to its end, and nobody is in doubt."""
    ends = set()
    for hundredths in range(0, 70, 3):
        moment_s = hundredths / 100
        times = {"cancel_at_s" if who == "migrate" else "end_at_s": moment_s}
        with pytest.MonkeyPatch.context() as patch:
            world, error, held = play(patch, [], True, streams=streams, mode=mode, **times)
        assert (world.source_runs, world.there, held) in {(True, "nothing", 0), (False, "runs", 0)}, moment_s
        assert (error is None) == (world.there == "runs"), moment_s
        ends.add(world.there)
    assert ends == {"nothing", "runs"}


def test_a_word_about_others_says_nothing_about_what_is_not_in_doubt_yet() -> None:
    """It stands there while its source decides; a moment later that is cancelled, and cannot say so."""
    ends = set()
    for after in range(300, 420, 5):
        with pytest.MonkeyPatch.context() as patch:
            fates = [Fate("silence", "there", after)]
            world, error, held = play(patch, fates, False, cancel_at_s=0.2, word_at_s=0.15)
        assert isinstance(error, KeyboardInterrupt)
        ends.add((world.source_runs, world.there, held))
    assert ends == {(True, "nothing", 0), (True, "stands", 1)}
