"""Descriptors up to the last number that the process may have, and where who builds it would like to have its own."""

import os
import resource
import select

from support import main

#: of descriptors that the process may have
MOST = 512
#: its own, far apart: the last ones, those that a puppet would have, and what lies behind these
NUMBERS = [MOST - 1, MOST - 3, 200, 203, 204]


def descriptors(program):
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST, MOST))
    for number in NUMBERS:
        made = os.eventfd(number)
        os.dup2(made, number)
        os.close(made)

    def counts():
        found = {}
        for number in NUMBERS:
            found[number] = os.eventfd_read(number)
            os.eventfd_write(number, found[number])
        return found

    program.same("each is under its number", counts, lambda: os.dup2(200, 203))
    program.same(
        "no others", lambda: sorted(map(int, os.listdir("/proc/self/fd"))), lambda: os.dup2(200, 210)
    )


def watched(program):
    """One that epoll knows by the number of a descriptor that was closed."""
    instance = select.epoll()
    event = os.eventfd(0)
    os.dup2(event, 201)
    instance.register(201, select.EPOLLIN)
    os.close(201)

    def reported():
        before = instance.poll(0)
        os.eventfd_write(event, 1)
        found = instance.poll(0)
        os.eventfd_read(event)
        return before, found

    program.same("watched under a number that is nobody's", reported, instance.close)


def body(program):
    watched(program)
    descriptors(program)


if __name__ == "__main__":
    main(body)
