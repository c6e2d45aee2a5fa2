"""What ``migrate`` does to databases.

Runs on: the main thread.
"""
