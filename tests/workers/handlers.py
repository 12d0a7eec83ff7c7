"""What SIGTERM means in a script that has a handler, and in a forked child of one that has none."""

import os
import signal
import sys

import headwater as hw


def own(*_: object) -> None:
    pass


signal.signal(signal.SIGTERM, own)
with hw.connect():
    print("the script's own:", signal.getsignal(signal.SIGTERM) is own, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with hw.connect():
    if os.fork() == 0:
        print("a forked child's:", repr(signal.getsignal(signal.SIGTERM)), flush=True)
        os._exit(0)
    os.wait()
sys.exit()
