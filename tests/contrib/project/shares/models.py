"""Shares."""

from django.db import models


class Share(models.Model):
    """A text that is to be summarised."""

    text = models.TextField()

    def __str__(self) -> str:
        return f"share {self.pk}"
