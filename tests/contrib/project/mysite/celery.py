"""A stock Celery worker of the project."""

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
app = Celery("mysite", broker=os.environ.get("RABBITMQ_URL"))
app.autodiscover_tasks()
