"""The wire format: strict JSON, AMQP properties and frames, Celery's message protocol.

Runs on: any thread.
"""
