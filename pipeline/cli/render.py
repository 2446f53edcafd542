"""Text for people on stderr, results on stdout; one JSON document with ``--json``.

While a command is at work nobody who reads is waited for (`unwaited`): a tree may stand still, and a terminal that ^S
has stopped, a pager, or a connection that is gone would keep it so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from pipeline import amounts
from pipeline.errors import Blocker, InDoubt, PipelineError, Refused

if TYPE_CHECKING:
    from pipeline.cli.outlet import Outlet

#: the streams of this process, while nobody is waited for, and where their lines go: made for the first one
_unwaited: dict[TextIO, Outlet | None] = {}
#: who hears what is said to a person, and whether that is instead of stderr
_hearer: Callable[[str], None] | None = None
_instead = False


def overhear(hearer: Callable[[str], None], *, instead: bool) -> None:
    """From now on tell `hearer` what is said to a person; with `instead`, nothing of it goes to stderr."""
    global _hearer, _instead
    _hearer, _instead = hearer, instead


def say(text: str) -> None:
    """A line for the person at the terminal."""
    if _hearer is not None:
        _hearer(text)
    if not _instead:
        show(text)


def show(text: str) -> None:
    """A line on stderr that no event says: progress, of which events have their own. Nobody has to read it."""
    with suppress(OSError):
        write(text, sys.stderr)


def write(text: str, stream: TextIO | None) -> None:
    """A line on stdout or stderr, if that is open; see `unwaited`."""
    outlet = outlet_of(stream)
    if outlet is not None:
        outlet.put(f"{text}\n".encode(errors="backslashreplace"))
    elif stream is not None:
        print(text, file=stream, flush=True)


def outlet_of(stream: TextIO | None) -> Outlet | None:
    """Where lines for a stream go while nobody is waited for; None: to itself."""
    if stream is None or stream not in _unwaited:
        return None
    if _unwaited[stream] is None:
        from pipeline.cli.outlet import Outlet

        try:
            _unwaited[stream] = Outlet(stream.fileno())
        except OSError:  # it is no descriptor
            del _unwaited[stream]
            return None
    return _unwaited[stream]


@contextmanager
def unwaited() -> Iterator[None]:
    """Within the block lines are written, kept or lost (see `Outlet`); nobody is waited for, at its end a moment."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    _unwaited.update(dict.fromkeys(streams))
    try:
        yield
    finally:
        for stream in streams:
            outlet = _unwaited.pop(stream, None)
            if outlet is not None:
                outlet.close()


def document(value: object) -> None:
    """The one JSON document of ``--json``, on stdout. Bytes are shown as text, or as ``hex:…`` where they are none."""
    import json

    print(json.dumps(plain(value), indent=2), flush=True)


def plain(value: object) -> Any:
    """Records, mappings and sequences as what JSON knows; byte strings as text or ``hex:…``."""
    import msgspec

    if isinstance(value, msgspec.Struct):
        return {
            name: plain(getattr(value, field))
            for name, field in zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bytes | bytearray | memoryview):
        return _printable(bytes(value))
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _printable(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return f"hex:{value.hex()}"
    return text if text.isprintable() else f"hex:{value.hex()}"


def blocker(item: Blocker) -> dict[str, Any]:
    """A blocker as JSON shows it."""
    return {
        "subject": item.subject,
        "reason": item.reason,
        "remedy": item.remedy,
        "transient": item.transient,
    }


def fail(command: str, error: PipelineError, *, json: bool) -> int:
    """Say what went wrong, to whom and what to do; returns the exit code."""
    text = str(error)
    heading, _, rest = text.partition("\n")
    say(f"{command}: {heading}" + (f"\n{rest}" if rest else ""))
    if isinstance(error, Refused):
        say(f"{command}: nothing was touched")
    elif isinstance(error, InDoubt):
        say(f"{command}: in doubt; the lines above say which side holds what and how to settle it")
    if json:
        blockers = error.blockers if isinstance(error, Refused) else ()
        document(
            {
                "error": type(error).__name__,
                "message": text,
                "exit_code": error.exit_code,
                "blockers": [blocker(item) for item in blockers],
            }
        )
    return error.exit_code


def figures(values: Mapping[str, Any]) -> str:
    """The figures of a result in one line, and the rate where it can be told."""
    parts = [f"{name} {amounts.figure(name, value)}" for name, value in values.items()]
    transferred, total_ms = values.get("transferred"), values.get("total-time")
    if isinstance(transferred, int | float) and isinstance(total_ms, int | float) and total_ms > 0:
        parts.append(f"rate {amounts.size(transferred * 1000 / total_ms)}/s")
    return ", ".join(parts)
