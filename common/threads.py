"""How OpenMP's threads wait for each other. To be imported before PyTorch, which loads OpenMP.

Waiting threads first spin, by default for milliseconds. Where other programs use the CPU cores too, a spinning thread
keeps its core from the thread that it waits for. Training steps in about 18 s (`demo.txt`, two threads on two cores,
GNU OpenMP), on idle cores and beside another program that uses both:

    default                       350      8
    GOMP_SPINCOUNT=1000, as here  249    108
    OMP_WAIT_POLICY=PASSIVE       177    149

What the user has set stays.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
