"""No collection of cycles while it is held off, and as before afterwards."""

from __future__ import annotations

import gc

from pipeline import garbage


def test_overlapping_blocks_hold_it_off_until_the_last_ends() -> None:
    assert gc.isenabled()
    first, second = garbage.held_off(), garbage.held_off()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with garbage.held_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
