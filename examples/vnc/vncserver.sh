#!/bin/bash
# An X server that is seen by VNC, with one program on it.
#
#   ./vncserver.sh xclock -update 1
#
# DISPLAY_NUMBER (1) and VNC_PORT (5900 + that) choose where; it ends with its X server.
set -eu
number=${DISPLAY_NUMBER:-1}
port=${VNC_PORT:-$((5900 + number))}

Xvnc ":$number" -geometry 320x320 -depth 24 -SecurityTypes None -localhost=1 -rfbport "$port" &
server=$!
until [ -S "/tmp/.X11-unix/X$number" ]; do
  kill -0 "$server" # ends the script if the server has ended
  sleep 0.1
done
DISPLAY=":$number" "$@" &
wait "$server"
