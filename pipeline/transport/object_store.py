"""Images in an object store, by obstore, whose blocking interface runs in worker threads.

What is written is a multipart upload, given up when writing fails; what fits into one part is put as it is, which takes
one request instead of three. Nothing is kept in memory or on the local disk on the way but two parts.

Reading at any place is by requests of ranges, several at a time. Each of them names the object that was opened by its
entity tag: of an object that was replaced meanwhile nothing is read. They are tried again by obstore for a moment only:
whoever waits for them is told, and decides.

A tree may stand still meanwhile: so a request that fails is tried again for half a minute at most, not for the three
that are usual. A dump that is cancelled, or fails, waits for a few seconds for a store that does not answer: then the
thread is left to itself, and `remains` says what may be left there.

Endpoint and credentials come from the usual AWS_* variables.

Source: RFC 9110, If-Match and Range; the docs of obstore on ClientConfig (30 s for a request, 5 s to connect) and
RetryConfig.
"""

from __future__ import annotations

import os
import queue
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from itertools import chain
from typing import Any

import trio

from pipeline.errors import ImageError, StorageError, UsageError
from pipeline.transport.framing import ByteSink, ByteSource
from pipeline.transport.storage import CLAIM, MANIFEST, RangeSource, claimed_by_another

_PART_BYTES = 8 << 20
#: how long a store is waited for that is to forget what was begun
_PATIENCE_S = 5.0
#: of all requests but those for ranges, and of these
_RETRY_PATIENTLY = {"retry_timeout": timedelta(seconds=30)}
_RETRY = {"max_retries": 2, "retry_timeout": timedelta(seconds=2)}


class _GiveUp(Exception):
    """Ends an upload that must not become an object."""


def _brief(error: BaseException) -> str:
    """What obstore says, without the dump of its own state that follows."""
    return str(error).partition("\n\nDebug source:")[0].strip()


class _UploadSink:
    """Hands parts to the thread that uploads; holds two parts at the most. `name`: what messages call the object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.parts: queue.Queue[bytes | _GiveUp | None] = queue.Queue(maxsize=2)
        self._part = bytearray()
        self.failed: list[BaseException] = []

    async def write(self, *buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                room = _PART_BYTES - len(self._part)
                self._part += view[:room]
                view = view[room:]
                if len(self._part) == _PART_BYTES:
                    await self._push(bytes(self._part))
                    self._part.clear()

    async def _push(self, part: bytes | _GiveUp | None) -> None:
        while not self.failed:
            with suppress(queue.Full):
                self.parts.put_nowait(part)
                return
            await trio.sleep(0.002)
        raise StorageError(f"{self._name}: {_brief(self.failed[0])}")

    async def finish(self) -> None:
        if self._part:
            await self._push(bytes(self._part))
        await self._push(None)

    def iterate(self) -> Iterator[bytes]:
        while (part := self.parts.get()) is not None:
            if isinstance(part, _GiveUp):
                raise part
            yield part


class _DownloadSource:
    def __init__(self, chunks: Iterator[Any], name: str) -> None:
        self._chunks = chunks
        self._name = name
        self._rest = memoryview(b"")

    async def read_into(self, view: memoryview) -> int:
        if not self._rest:
            try:
                chunk = await trio.to_thread.run_sync(next, self._chunks, None, abandon_on_cancel=True)
            except Exception as error:
                raise StorageError(f"{self._name}: {_brief(error)}") from error
            if chunk is None:
                return 0
            self._rest = memoryview(bytes(chunk))
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class _ObjectRanges:
    """An object as it was when it was looked at.

    Args:
        store: of obstore.
        path: in it.
        name: what messages call it.
        meta: what `obstore.head` said of it.
    """

    def __init__(self, store: Any, path: str, name: str, meta: Any) -> None:
        self._store = store
        self._path = path
        self.name = name
        self.size_bytes: int = meta["size"]
        self._tag: str | None = meta["e_tag"]

    async def read_at(self, offset: int, view: memoryview) -> None:
        """See `RangeSource`. Cancellation: at once; what is on its way goes nowhere."""
        if not view:
            return  # there is no range of nothing
        content = await trio.to_thread.run_sync(self._get, offset, len(view), abandon_on_cancel=True)
        if len(content) != len(view):
            raise ImageError(f"{self.name}: the object became shorter: it is truncated")
        view[:] = content

    def _get(self, offset: int, size: int) -> memoryview:
        import obstore
        from obstore.exceptions import PreconditionError

        changed = f"{self.name}: the object was replaced while it was read"
        options: Any = {"range": (offset, offset + size), "if_match": self._tag}
        try:
            found = obstore.get(self._store, self._path, options=options)
            content = memoryview(found.bytes())
        except PreconditionError:
            raise ImageError(changed) from None
        except FileNotFoundError:
            raise ImageError(f"{self.name}: the object was removed while it was read") from None
        except Exception as error:
            raise StorageError(f"{self.name}: {_brief(error)}") from error
        if found.meta["e_tag"] != self._tag:  # there are stores that pay no heed to If-Match
            raise ImageError(changed)
        return content


class ObjectStorage:
    """A prefix in an object store."""

    has_manifest = True
    reads_at_once = 6

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        scheme, _, rest = self.name.partition("://")
        bucket, _, self._prefix = rest.partition("/")
        if not bucket:
            raise UsageError(f"{url}: names no bucket; write it like s3://bucket/prefix")
        self._bucket_url = f"{scheme}://{bucket}"
        self._made: Any = None
        self.remains: list[str] = []

    def _store(self) -> Any:
        if self._made is None:
            self._made = self._make_store(retry_config=_RETRY_PATIENTLY)
        return self._made

    def _make_store(self, **options: Any) -> Any:
        from obstore.store import from_url

        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            options["client_options"] = {"allow_http": True}
        try:
            return from_url(self._bucket_url, **options)
        except Exception as error:
            raise StorageError(f"{self.name}: {_brief(error)}") from error

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    async def require_free(self) -> None:
        """See `Storage.require_free`."""
        import obstore

        def look() -> bool:
            try:
                obstore.head(self._store(), self._path(MANIFEST))
            except FileNotFoundError:
                return False
            return True

        try:
            taken = await trio.to_thread.run_sync(look, abandon_on_cancel=True)
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.name}: {_brief(error)}") from error
        if taken:
            raise UsageError(f"{self.name} holds an image already; give another prefix, or remove it")

    @asynccontextmanager
    async def claimed(self) -> AsyncIterator[None]:
        """See `Storage.claimed`; where the store writes objects on conditions, as S3 does since 2024."""
        token = secrets.token_bytes(16)
        try:
            is_ours = await trio.to_thread.run_sync(self._claim, token, abandon_on_cancel=True)
        except StorageError:
            raise
        except BaseException as error:
            self.remains.append(CLAIM)
            if isinstance(error, Exception):
                raise StorageError(f"{self.name}/{CLAIM}: {_brief(error)}") from error
            raise
        if not is_ours:
            raise UsageError(claimed_by_another(self.name))
        try:
            await self.require_free()
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self.discard(CLAIM)

    def _claim(self, token: bytes) -> bool:
        """Write the claim; whether it is ours. In a worker thread."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        store, path = self._make_store(retry_config=_RETRY), self._path(CLAIM)
        try:
            obstore.put(store, path, token, mode="create", use_multipart=False)
        except AlreadyExistsError:
            # maybe an answer was lost, and it was asked for again
            with suppress(FileNotFoundError):
                return bytes(obstore.get(store, path).bytes()) == token
            return False
        except Exception as error:
            if "501 Not Implemented" not in _brief(error):
                raise
            obstore.put(store, path, token, use_multipart=False)
        return True

    @asynccontextmanager
    async def create(self, name: str, room_bytes: int = 0) -> AsyncIterator[ByteSink]:
        """See `Storage.create`."""
        import obstore

        sink = _UploadSink(f"{self.name}/{name}")
        path = self._path(name)

        def upload() -> None:
            try:
                parts = sink.iterate()
                first = next(parts, b"")
                if len(first) < _PART_BYTES:
                    next(parts, None)  # it was the last one; raises if it is given up
                    obstore.put(self._store(), path, first, use_multipart=False)
                else:
                    whole = chain([first], parts)
                    obstore.put(self._store(), path, whole, chunk_size=_PART_BYTES, use_multipart=True)
            except BaseException as error:  # noqa: BLE001 (said by whoever waits for the upload)
                sink.failed.append(error)

        lost: list[Exception] = []
        uploading = trio.CancelScope(shield=True)
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def run() -> None:
                with uploading:
                    await trio.to_thread.run_sync(upload, abandon_on_cancel=True)
                if uploading.cancelled_caught:
                    self.remains.append(name)
                done.set()

            async def hurry() -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    uploading.deadline = trio.current_time() + self._patience_s()

            nursery.start_soon(run)
            nursery.start_soon(hurry)
            try:
                yield sink
                await sink.finish()
            except Exception as error:  # noqa: BLE001 (raised below: a nursery would wrap it in a group)
                _give_up(sink)
                lost.append(error)
                nursery.cancel_scope.cancel()
            except BaseException:
                _give_up(sink)
                raise
            with trio.CancelScope(shield=True):
                await done.wait()
            nursery.cancel_scope.cancel()
        if lost:
            raise lost[0]
        if sink.failed:
            raise StorageError(f"{self.name}/{name}: {_brief(sink.failed[0])}")

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[ByteSource]:
        """See `Storage.open`."""
        import obstore

        try:
            result = await trio.to_thread.run_sync(
                obstore.get, self._store(), self._path(name), abandon_on_cancel=True
            )
        except FileNotFoundError:
            raise ImageError(f"{self.name}: there is no complete image here") from None
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.name}/{name}: {_brief(error)}") from error
        yield _DownloadSource(iter(result.stream(min_chunk_size=1 << 20)), f"{self.name}/{name}")

    @asynccontextmanager
    async def open_ranges(self, name: str) -> AsyncIterator[RangeSource]:
        """See `Storage.open_ranges`."""
        import obstore

        try:
            meta = await trio.to_thread.run_sync(
                obstore.head, self._store(), self._path(name), abandon_on_cancel=True
            )
        except FileNotFoundError:
            raise ImageError(f"{self.name}: there is no complete image here") from None
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.name}/{name}: {_brief(error)}") from error
        store = self._make_store(retry_config=_RETRY)
        yield _ObjectRanges(store, self._path(name), f"{self.name}/{name}", meta)

    async def discard(self, name: str) -> None:
        """See `Storage.discard`."""
        import obstore

        def delete() -> None:
            with suppress(FileNotFoundError):
                obstore.delete(self._store(), self._path(name))

        try:
            with trio.fail_after(self._patience_s()):
                await trio.to_thread.run_sync(delete, abandon_on_cancel=True)
        except Exception:  # noqa: BLE001 (whatever obstore says, it may be there)
            if name not in self.remains:
                self.remains.append(name)

    def _patience_s(self) -> float:
        """For how long to wait now; a store that has not answered is not waited for again."""
        return 0.0 if self.remains else _PATIENCE_S


def _give_up(sink: _UploadSink) -> None:
    while True:
        with suppress(queue.Full):
            sink.parts.put_nowait(_GiveUp("given up"))
            return
        with suppress(queue.Empty):
            sink.parts.get_nowait()
