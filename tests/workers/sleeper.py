"""Connect and make no step."""

import signal
import sys

import headwater as hw

with hw.connect():
    sys.stdout.write("sleeps\n")
    signal.pause()
