"""A Jupyter kernel and its client: cells that build on each other, and one that runs all the while.

Rounds go to "counts", what is wrong to "wrong". SIGTERM shuts the kernel down.
"""

import os
import signal
import sys
from queue import Empty

from jupyter_client.manager import KernelManager


def wrong(text):
    with open("wrong", "a") as out:
        out.write(text + "\n")


def run(client, code):
    """What a cell prints and its value."""
    request = client.execute(code)
    printed, value = "", None
    while True:
        try:
            message = client.get_iopub_msg(timeout=60)
        except Empty:
            wrong(f"nothing comes from {code!r}")
            sys.exit(1)
        if message["parent_header"].get("msg_id") != request:
            continue
        content = message["content"]
        if message["msg_type"] == "stream":
            printed += content["text"]
        elif message["msg_type"] == "execute_result":
            value = content["data"]["text/plain"]
        elif message["msg_type"] == "error":
            wrong(f"{code!r}: {content}")
        elif message["msg_type"] == "status" and content["execution_state"] == "idle":
            break
    while True:  # answers to what the client asked when it waited for the kernel come first
        reply = client.get_shell_msg(timeout=60)
        if reply["parent_header"].get("msg_id") == request:
            break
    if reply["content"]["status"] != "ok":
        wrong(f"the reply to {code!r} is {reply}")
    return printed, value


def main():
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    manager = KernelManager(transport=sys.argv[1], connection_file=os.path.abspath("kernel.json"))
    if sys.argv[1] == "ipc":
        manager.ip = os.path.abspath("kernel")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    kernel = run(client, "import os, time, math; x = 0; kept = {}; os.getpid()")[1]
    number = 0
    while not ended:
        number += 1
        # it prints while it runs, over a tenth of a second: a move comes into the middle of it
        said, value = run(
            client,
            "for i in range(10):\n    time.sleep(0.01); print(i, end=' ')\n"
            f"x += {number}; kept[{number}] = math.sqrt(x)\n"
            "(x, len(kept), os.getpid())",
        )
        if said.split() != [str(n) for n in range(10)]:
            wrong(f"round {number} prints {said!r}")
        if value != f"({number * (number + 1) // 2}, {number}, {kernel})":
            wrong(f"round {number} is {value}")
        if not client.hb_channel.is_beating() and number > 100:
            wrong(f"no heartbeat in round {number}")
        with open("counts", "a") as out:
            out.write(f"{number}\n")
    client.stop_channels()
    manager.shutdown_kernel()


main()
