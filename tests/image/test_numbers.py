"""Numbers that nobody of a tree has."""

from __future__ import annotations

from msgspec.structs import replace

from pipeline.image.codec import Image
from pipeline.image.numbers import PUPPET_FDS, puppet_descriptors
from pipeline.image.schema import FdEntry
from tests.image.test_graft import image
from tests.image.test_plan import process


def with_descriptors(*numbers: int) -> Image:
    """A process that has these, and one that has none."""
    fds = [FdEntry(number, 1, False) for number in numbers]
    return image(replace(process([10]), fds=fds), process([11], 10))


def test_a_puppet_has_its_own_descriptors_above_those_of_a_dense_table():
    assert puppet_descriptors(with_descriptors(0, 1, 2), 0).start == 200
    assert puppet_descriptors(with_descriptors(0, 1, 2), 1000).start > 1003
    assert puppet_descriptors(with_descriptors(*range(900)), 0).start > 900


def test_a_puppet_has_its_own_descriptors_between_those_that_are_far_apart():
    assert puppet_descriptors(with_descriptors(0, 199, 1 << 20), 0) == range(200, 200 + PUPPET_FDS)
    assert puppet_descriptors(with_descriptors(200, 203), 0) == range(204, 204 + PUPPET_FDS)
    assert puppet_descriptors(with_descriptors(201, 205), 0) == range(202, 202 + PUPPET_FDS)
    assert puppet_descriptors(with_descriptors(201, 204), 0) == range(205, 205 + PUPPET_FDS)
