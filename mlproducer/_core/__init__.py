"""Judgement: what becomes of a message. Pure: takes ``now``, knows no clock, thread, lock or pika.

Runs on: the I/O thread; in tests, any.
"""
