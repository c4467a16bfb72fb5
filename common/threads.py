"""How OpenMP's threads wait for each other. To be imported before PyTorch, which loads OpenMP.

Waiting threads spin by default. Where other programs use the CPU cores too, a spinning thread keeps its core from the
thread that it waits for: with one other program on two cores, a training step took 20 times as long as with threads
that sleep. A value that the user has set stays.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
