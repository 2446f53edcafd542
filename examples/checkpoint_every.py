"""Checkpoint a running tree every N minutes and keep the last K images.

    python examples/checkpoint_every.py PID MINUTES KEEP DIRECTORY-or-s3://BUCKET/PREFIX

The tree goes on after each checkpoint. Go back to the newest with
`python -m pipeline restore --from PLACE/2026-01-31T12-00-00Z`. Ends when the tree does.
S3 credentials come from the usual AWS_* variables.
"""

from __future__ import annotations

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import psutil
import trio

import pipeline


class Place(Protocol):
    """Where images are kept."""

    def image(self, name: str) -> str:
        """What `pipeline.dump` is to be given for an image of this name."""

    def names(self) -> list[str]:
        """Names of the images there, oldest first."""

    def remove(self, name: str) -> None:
        """Remove an image, its manifest first, so that half an image never looks whole."""


class Folder:
    """Images are directories in a directory."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)

    def image(self, name: str) -> str:
        """See `Place`."""
        return str(self.root / name)

    def names(self) -> list[str]:
        """See `Place`."""
        return sorted(entry.name for entry in self.root.iterdir() if (entry / "manifest").exists())

    def remove(self, name: str) -> None:
        """See `Place`."""
        (self.root / name / "manifest").unlink()
        shutil.rmtree(self.root / name)


class Bucket:
    """Images are prefixes in an object store."""

    def __init__(self, url: str) -> None:
        from obstore.store import from_url

        self.url = url.rstrip("/")
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        options = {"client_options": {"allow_http": True}} if plain else {}
        self.store = from_url(self.url, **options)  # type: ignore[call-overload]

    def image(self, name: str) -> str:
        """See `Place`."""
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        """See `Place`."""
        import obstore

        paths = [item["path"] for batch in obstore.list(self.store) for item in batch]
        return sorted(path.split("/")[-2] for path in paths if path.endswith("/manifest"))

    def remove(self, name: str) -> None:
        """See `Place`."""
        import obstore

        paths = [item["path"] for batch in obstore.list(self.store, f"{name}/") for item in batch]
        for path in sorted(paths, key=lambda path: not path.endswith("/manifest")):
            obstore.delete(self.store, path)


async def main(pid: int, minutes: float, keep: int, where: str) -> int:
    """Dump, drop the oldest, sleep; until the tree is gone or cannot be dumped at all."""
    place: Place = await trio.to_thread.run_sync(Bucket if "://" in where else Folder, where)
    while psutil.pid_exists(pid):
        name = f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}"
        try:
            result = await pipeline.dump(pid, place.image(name), leave="running")
        except pipeline.Refused as error:
            if not all(blocker.transient for blocker in error.blockers):
                print(error, file=sys.stderr)
                return error.exit_code
            print(f"{name}: not now: {error}", file=sys.stderr)
        except pipeline.PipelineError as error:
            # The tree runs on; a full disk or a network that is down may be better next time.
            print(f"{name}: {error}", file=sys.stderr)
        else:
            print(f"{name}: {result.figures}", flush=True)
            names = await trio.to_thread.run_sync(place.names)
            for old in names[:-keep]:
                await trio.to_thread.run_sync(place.remove, old)
        await trio.sleep(minutes * 60)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 5 or int(sys.argv[3]) < 1:
        sys.exit(__doc__)
    sys.exit(trio.run(main, int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
