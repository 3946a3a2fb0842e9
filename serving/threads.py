"""Threads that leave the cores to the denoiser where they share a process with it.

Most of what else a process does can wait for some milliseconds: another chunk is decoded, written and shown by the time
that it is played. A denoiser that is put off makes everybody's video later, and it is the one that always has work.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

# A tenth of the denoiser's weight: where both want one core it is as good as the denoiser's, but nobody who is short of
# cores is kept from going on.
NICENESS = 10

_giving_way = threading.Event()


def give_way() -> None:
    """From now on this process's threads in the background begin nicer than its others; there is no way back."""
    _giving_way.set()


def background_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """For decoding, encoding, files and the database."""
    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_begin)


def _begin() -> None:
    # Elsewhere a niceness is a whole process's.
    if _giving_way.is_set() and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
