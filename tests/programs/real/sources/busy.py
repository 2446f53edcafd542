"""Python as services use it: a pool, queues, shared memory, threads, asyncio with subprocesses, a pipeline, sqlite.

Counts go to "counts", what is wrong to "wrong", and to "gaps" when a thread slept longer than it wanted.
SIGTERM ends it: it then looks at its database once more.
"""

import asyncio
import hashlib
import multiprocessing
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory


def wrong(text):
    with open("wrong", "a") as out:
        out.write(text + "\n")


def note(name, mode, number):
    with open(name, mode) as out:
        out.write(f"{number}\n")


def digest(text):
    return hashlib.sha256(text.encode() * 1000).hexdigest()


def answer(questions, answers):
    """A child that answers from a queue to another one."""
    while (question := questions.get()) is not None:
        answers.put((question, digest(question)))


def add(name, count, lock):
    """A child that counts in shared memory."""
    block = shared_memory.SharedMemory(name)
    while True:
        with lock:
            value = int.from_bytes(block.buf[:8], "little")
            block.buf[:8] = (value + 1).to_bytes(8, "little")
            block.buf[8:16] = (value + 1).to_bytes(8, "big")
            count.value += 1
        time.sleep(0.002)


def book(number, stop):
    """A child that moves amounts between rows of a database that another one uses, too."""
    data = sqlite3.connect("data.db", timeout=30, isolation_level=None)
    turn = 0
    while not stop.is_set():
        turn += 1
        data.execute("BEGIN IMMEDIATE")
        data.execute("UPDATE accounts SET amount = amount - 1 WHERE id = ?", (turn % 100,))
        data.execute("UPDATE accounts SET amount = amount + 1 WHERE id = ?", ((turn * 7 + number) % 100,))
        data.execute("INSERT INTO turns VALUES (?, ?)", (number, turn))
        data.execute("COMMIT")
        (total,) = data.execute("SELECT sum(amount) FROM accounts").fetchone()
        if total != 0:
            wrong(f"the accounts of {number} sum up to {total}")
    last = data.execute("SELECT count(*), max(turn) FROM turns WHERE who = ?", (number,)).fetchone()
    if last != (turn, turn):
        wrong(f"turns of {number}: {last} instead of {turn}")
    data.close()


def thread(ticks, lock, number):
    last = time.monotonic()
    while True:
        with lock:
            ticks[number] += 1
        time.sleep(0.003)
        now = time.monotonic()
        if now - last > 0.02:
            note("gaps", "a", f"gap {1e3 * (now - last):.1f} at {time.time():.3f}")
        last = now


async def talk(count):
    """One child of asyncio that echoes, and a short one for each round."""
    echo = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    pipeline = subprocess.Popen(  # noqa: ASYNC220 (programs do)
        "while read -r n; do echo $n | tr 0-9 a-j | tr a-j 0-9; done",
        shell=True,
        stdin=-1,
        stdout=-1,
        bufsize=0,
    )
    while True:
        number = await count.get()
        echo.stdin.write(b"%d\n" % number)
        if await echo.stdout.readline() != b"%d\n" % number:
            wrong(f"the echo of {number}")
        child = await asyncio.create_subprocess_exec("echo", str(number), stdout=-1)
        said, _ = await child.communicate()
        if said != b"%d\n" % number or child.returncode:
            wrong(f"the short child of {number} says {said!r} {child.returncode}")
        pipeline.stdin.write(b"%d\n" % number)
        if pipeline.stdout.readline().strip() != b"%d" % number:
            wrong(f"the pipeline at {number}")
        count.task_done()


async def main():
    method = sys.argv[1]
    multiprocessing.set_start_method(method)
    data = sqlite3.connect("data.db")
    data.execute("PRAGMA journal_mode = wal")
    data.execute("CREATE TABLE accounts (id INTEGER PRIMARY KEY, amount INTEGER)")
    data.execute("CREATE TABLE turns (who INTEGER, turn INTEGER)")
    data.executemany("INSERT INTO accounts VALUES (?, 0)", [(n,) for n in range(100)])
    data.commit()
    data.close()

    block = shared_memory.SharedMemory(create=True, size=4096)
    lock, count, stop = multiprocessing.Lock(), multiprocessing.Value("q", 0), multiprocessing.Event()
    questions, answers = multiprocessing.Queue(), multiprocessing.Queue()
    children = [
        multiprocessing.Process(target=answer, args=(questions, answers)),
        multiprocessing.Process(target=add, args=(block.name, count, lock)),
        *(multiprocessing.Process(target=book, args=(number, stop)) for number in (1, 2)),
    ]
    for child in children:
        child.daemon = True
        child.start()
    pool = multiprocessing.Pool(2)
    ticks, guard = [0, 0], threading.Lock()
    for number in (0, 1):
        threading.Thread(target=thread, args=(ticks, guard, number), daemon=True).start()

    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    numbers = asyncio.Queue()
    talker = asyncio.create_task(talk(numbers))
    number = 0
    while not ended.is_set():
        number += 1
        before = sum(ticks), count.value
        numbers.put_nowait(number)
        for text in (f"a{number}", f"b{number}"):
            questions.put(text)
        if pool.map(digest, [f"{number} {i}" for i in range(4)]) != [
            digest(f"{number} {i}") for i in range(4)
        ]:
            wrong(f"the pool at {number}")
        for text in (f"a{number}", f"b{number}"):
            if answers.get(timeout=60) != (text, digest(text)):
                wrong(f"the queue at {number}")
        with lock:
            if (
                not int.from_bytes(block.buf[:8], "little")
                == int.from_bytes(block.buf[8:16], "big")
                == count.value
            ):
                wrong(f"the shared memory at {number}")
        await numbers.join()
        deadline = time.monotonic() + 60
        while not (before[0] < sum(ticks) and before[1] < count.value):
            await asyncio.sleep(0.01)
            if time.monotonic() > deadline:
                wrong(f"a thread or a child stands still at {number}")
                break
        for child in children:
            if not child.is_alive():
                wrong(f"{child} has ended")
        note("counts", "a", number)
    stop.set()
    for child in children[2:]:
        child.join(60)
    talker.cancel()
    questions.put(None)
    children[0].join(60)
    children[1].kill()
    children[1].join()
    pool.terminate()
    block.close()
    block.unlink()
    (state,) = sqlite3.connect("data.db").execute("PRAGMA integrity_check").fetchone()
    if state != "ok":
        wrong(f"the database: {state}")
    note("ended", "w", number)


if __name__ == "__main__":
    asyncio.run(main())
