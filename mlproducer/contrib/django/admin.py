"""The outbox on Django's admin site: what waits there, and two actions; nothing can be edited.

Who may view messages sees them; who may change them may use the actions.

Runs on: Django's threads.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest

from mlproducer.contrib.django.models import OutboxMessage
from mlproducer.contrib.django.process import one
from mlproducer.dead_letters import Letter, StoredDeadLetters
from mlproducer.errors import ConfigurationError, PublishError, StoreError

State = OutboxMessage.State


SITUATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ready": ("to be sent now", {"ready": True}),
    "later": ("waits for a retry", {"ready": False, "owner": 0, "state__lt": State.ASIDE}),
    "claimed": ("claimed by a process", {"ready": False, "owner__gt": 0}),
    "dead": ("dead letter", {"state": State.DEAD}),
    "aside": ("damaged", {"state": State.ASIDE}),
}


class SituationFilter(admin.SimpleListFilter):
    """Where a row stands; claimed ones are being sent by a process."""

    title = "situation"
    parameter_name = "situation"

    def lookups(self, _request: HttpRequest, _model: Any) -> list[tuple[str, str]]:
        """Return what can be chosen."""
        return [(name, words) for name, (words, _) in SITUATIONS.items()]

    def queryset(self, _request: HttpRequest, queryset: QuerySet) -> QuerySet:
        """Return the rows of what was chosen."""
        chosen = SITUATIONS.get(self.value() or "")
        return queryset if chosen is None else queryset.filter(**chosen[1])


@admin.register(OutboxMessage)
class OutboxMessageAdmin(admin.ModelAdmin):
    """A list that can be searched by message id."""

    list_display = (
        "message_id", "task_type", "routing_key", "state", "ready", "attempts", "accepted", "due",
    )  # fmt: skip
    fields = (
        "message_id", "task_type", "exchange", "routing_key", "state", "ready", "due", "attempts",
        "doubtful", "reason", "accepted",
    )  # fmt: skip
    readonly_fields = fields
    list_filter = (SituationFilter, "task_type", "routing_key")
    search_fields = ("=message_id",)
    ordering = ("key",)
    show_full_result_count = False
    actions = ("send_now", "replay")

    @admin.display(description="added", ordering="accepted_at")
    def accepted(self, row: OutboxMessage) -> datetime | None:
        """Show the time at which it was added."""
        return row.accepted

    def has_add_permission(self, _request: HttpRequest) -> bool:
        """Refuse it: rows come from `publish_in_transaction`."""
        return False

    def has_change_permission(self, _request: HttpRequest, _obj: Any = None) -> bool:
        """Refuse it: a row belongs to the process that sends it."""
        return False

    def has_delete_permission(self, _request: HttpRequest, _obj: Any = None) -> bool:
        """Refuse it: ``mlproducer dead-letters purge`` deletes dead letters."""
        return False

    def has_replay_permission(self, request: HttpRequest) -> bool:
        """Allow the actions to those who may change rows."""
        return bool(request.user.has_perm("mlproducer.change_outboxmessage"))

    @admin.action(description="Send now what waits for a retry", permissions=["replay"])
    def send_now(self, request: HttpRequest, queryset: QuerySet) -> None:
        """Make rows due that no process has claimed; a relay sends them with its next sweep."""
        waiting = queryset.filter(owner=0, ready=False, state__lt=State.ASIDE)
        count = waiting.update(ready=True)
        self.message_user(request, f"{count} are sent with the next sweep")

    @admin.action(description="Replay dead letters", permissions=["replay"])
    def replay(self, request: HttpRequest, queryset: QuerySet) -> None:
        """Publish dead letters to their original routes; one that cannot be sent stays."""
        letters = queryset.filter(state=State.DEAD)
        wanted = set(letters.values_list("message_id", flat=True))
        outcomes = Counter[str]()

        def tell(_letter: Letter, error: PublishError | None) -> None:
            outcomes["sent" if error is None else type(error).__name__] += 1

        try:
            if wanted:
                StoredDeadLetters(one.current().settings).replay(wanted, tell)
        except (ConfigurationError, StoreError, PublishError) as error:
            self.message_user(request, str(error), messages.ERROR)
        sent = outcomes.pop("sent", 0)
        self.message_user(request, f"{sent} sent")
        if outcomes:
            stayed = ", ".join(f"{count} {name}" for name, count in outcomes.items())
            self.message_user(request, f"not sent: {stayed}", messages.WARNING)
