"""Observation: events, and the logs, metrics, callbacks and spans made from them.

Runs on: see each module.
"""
