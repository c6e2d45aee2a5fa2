"""At home in other frameworks: each has a module here, which needs that framework installed.

Runs on: the threads of the framework.
"""
