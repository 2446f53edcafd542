"""Memory over the wire, at a stop: the rate of `migrate` beside bare sockets of the same moment.

Without TLS beside two of them: one whose other side throws away what it gets, and one that puts it into memory, as a
destination has to.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench import bare
from bench.commands import Writer, migrated, serving
from bench.extent import Extent
from bench.matrix import Case, Sample
from bench.plain import too_large
from tests.harness.hosts import write_secret

#: connections of a migration with TLS: one, and as many as there are processors on a small machine
_STREAMS = (1, 2)
_COPIES = 2


def cases(extent: Extent) -> list[Case]:
    """For each size without TLS, and with it over one and over two connections."""
    found = []
    for mib in extent.wires:
        missing = too_large(mib, _COPIES)
        found.append(Case("wire", f"{mib} MiB, plain", partial(_plain, mib), {"mib": mib}, missing))
        for streams in _STREAMS:
            name = f"{mib} MiB, TLS, {streams} stream{'s' if streams > 1 else ''}"
            parameters: dict[str, float | str] = {"mib": mib, "streams": streams}
            found.append(Case("wire", name, partial(_tls, mib, streams), parameters, missing))
    return found


def _plain(mib: int, folder: Path) -> Sample:
    with Writer.started(folder, mib) as writer:
        sent, put = bare.send_rate(writer.pid), bare.put_rate(writer.pid)
        sample = _moved(writer, folder, sent, "--plaintext")
    figures = {"bare-put-rate": put, "of-bare-put-ratio": sample.figures["rate"] / put}
    return Sample({**sample.figures, **figures}, sample.checks)


def _tls(mib: int, streams: int, folder: Path) -> Sample:
    with Writer.started(folder, mib) as writer:
        return _moved(writer, folder, bare.tls_rate(mib << 20, streams), "--streams", str(streams))


def _moved(writer: Writer, folder: Path, bare_rate: float, *options: str) -> Sample:
    secret = write_secret(folder / "secret")
    theirs = [option for option in options if option == "--plaintext"]
    with serving(folder, secret, *theirs) as server:
        figures = migrated(writer, server, secret, ("--mode", "stop", *options))
        is_whole = writer.is_whole()
    rate = 1e3 * figures["page-bytes"] / figures["transfer-time"]
    return Sample(
        {
            "rate": rate,
            "bare-rate": bare_rate,
            "of-bare-ratio": rate / bare_rate,
            "downtime-ms": figures["downtime"],
            "total-ms": figures["total-time"],
        },
        {"its memory is what it was": is_whole},
    )
