#!/bin/sh
# Runs its arguments in a pid and a mount namespace of their own: trees are restored with the pids they had, and
# what the engine and ip-netns(8) note in /run is of this worker only.
exec unshare --pid --mount --fork --kill-child --mount-proc sh -c '
    for place in /run/netns /run/pipeline; do
        mkdir -p "$place" && mount -t tmpfs -o mode=0755 none "$place" || exit 1
    done
    setsid --wait "$@"
    exit $?' - "$@"
