"""Settings: SQLite, or the database that the environment names; the broker is its, too."""

import json
import os
from pathlib import Path

SECRET_KEY = "of no worth"
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "mysite.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "mlproducer.contrib.django",
    "shares",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DATABASES = {
    "default": json.loads(os.environ.get("DATABASE", "null"))
    or {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("SQLITE", str(Path(__file__).parent / "db.sqlite3")),
    }
}
MLPRODUCER = json.loads(os.environ.get("MLPRODUCER", "{}"))
TASKS = {
    "default": {
        "BACKEND": "mlproducer.contrib.django.tasks.Backend",
        "QUEUES": [],
        "OPTIONS": json.loads(os.environ.get("TASK_OPTIONS", "{}")),
    }
}
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "loggers": {"mlproducer": {"handlers": ["console"], "level": "WARNING"}},
}
