"""Threads and the wire: what carries out the sender's judgement on a real broker.

Runs on: see each module.
"""
