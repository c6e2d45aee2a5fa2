"""The libraries that are compared, each in a process of its own that does as it is told.

``python -m benchmarks.contestants NAME OPTIONS`` is such a process: it connects, says so, and then
answers each line of standard input, a job, with a line of figures. `client.c` speaks the same way.
"""
