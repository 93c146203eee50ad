"""Two processes run the tests, each on a core: torch's threads, two to a process, would wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in what tests start
