"""Bytes and nothing else: strict JSON, AMQP property lists and frames, Celery's message protocol.

Runs on: any thread.
"""
