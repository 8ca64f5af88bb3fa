"""How many cores a thread computes on."""

import torch


def compute_on(cores: int) -> None:
    """Give the calling thread a number of its own.

    torch asks OpenMP, which keeps one a thread; but a thread that computes for the first time takes
    over the number that was set last, by whichever thread. Who sets one while others compute must
    have been asked before.

    A thread that has computed on several cores keeps a team of threads for it. Where all teams have
    more threads than there are cores, theirs sleep between two products instead of waiting, and a
    decode step takes a quarter longer: let one thread of a process compute on several, others on 1.
    """
    torch.get_num_threads()
    torch.set_num_threads(cores)
