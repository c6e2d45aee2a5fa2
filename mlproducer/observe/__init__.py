"""Who watches: events, and what logs and callbacks make of them. Nothing here decides anything.

Runs on: see each room.
"""
