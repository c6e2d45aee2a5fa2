"""Commands of ``manage.py``.

Runs on: the main thread.
"""
