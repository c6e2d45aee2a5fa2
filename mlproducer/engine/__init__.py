"""Threads and the wire: what carries out the courier's judgement on a real broker.

Runs on: see each room.
"""
