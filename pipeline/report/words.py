"""What the stages, the parts of the pause and the figures of a log mean, in a few words each."""

from __future__ import annotations

STAGES = {
    "start": "the command starts, and loads what it needs",
    "setup": "what would be in the way is looked for; the other side is reached and proves itself",
    "draft": "a first, short stop to look at the tree; then all of its memory is sent while it runs",
    "round": "what was written meanwhile is sent while the tree runs",
    "rounds": "what was written meanwhile is sent while the tree runs, round by round",
    "freeze": "the tree is stopped, and its state is read",
    "memory": "memory is sent, or what is left of it",
    "write": "the image is completed",
    "prepare": "the destination completes its tree; then this one is ended and that one runs",
    "take-back": "the tree runs on here, and the destination is told, which does not answer",
    "rebuild": "processes, namespaces and what they hold are made again",
    "finish": "the tree becomes what it was at its last stop",
    "thaw": "the tree is let run",
}

PARTS = {
    "freeze": "every thread is stopped",
    "collect": "the state of the tree is read",
    "last-pages": "the rest of its memory is sent",
    "transfer": "what is sent has arrived",
    "finish": "the destination completes its tree",
    "thaw": "the tree is ended here and runs there",
}

FIGURES = {
    "total-time": "from the first step to the last, without the start of the command",
    "setup-time": "until the tree is touched",
    "downtime": "the tree stood still",
    "freeze-time": "of that: stopping every thread",
    "collect-time": "of that: reading the state of the tree",
    "transfer-time": "of that: sending the rest of its memory",
    "finish-time": "of that: the destination completes its tree",
    "thaw-time": "of that: ending the tree here and letting it run there",
    "draft-time": "the first, short stop, before the memory was sent",
    "transferred": "bytes that were sent or written, all in all",
    "page-bytes": "of memory, before compression",
    "injected-calls": "system calls that the tree was made to do, to be asked for its state",
    "duplicate": "pages of zeros, told and not sent",
    "compression-rate": "bytes before compression for each byte after it",
    "cpu-throttle-percentage": "of its time the tree was held back at most, because it wrote faster than it was sent",
    "throttle-time": "it stood still so long for that, in short slices",
    "dirty-sync-count": "rounds in which memory was sent while the tree ran",
}


def stage(name: str) -> str:
    """What a stage is; empty if it is not known here. Rounds have numbers."""
    return STAGES.get(name.partition(" ")[0], "")
