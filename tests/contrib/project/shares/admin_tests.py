"""The admin pages of the outbox, on PostgreSQL, with a broker's URL in the environment."""

import os

from django.contrib.auth.models import Permission, User
from django.db import connection, transaction
from django.test import TransactionTestCase, override_settings
from django.urls import reverse

from mlproducer import CeleryTask, MLProducer, Settings, outbox
from mlproducer._wire.dead_letter import dead_letter
from mlproducer.contrib.django.models import OutboxMessage
from mlproducer.stores.postgres import PostgreSQLStore
from mlproducer.stores.protocol import Change, Record

HEADERS = {"x-original-exchange": "", "x-original-routing-key": "k"}

PAGE = reverse("admin:mlproducer_outboxmessage_changelist")


def store_url() -> str:
    """Name the database of the tests."""
    given = connection.settings_dict
    place = f"{given['HOST']}:{given['PORT']}/{given['NAME']}"
    return f"postgresql://{given['USER']}:{given['PASSWORD']}@{place}"


def add(*names: str) -> None:
    """Commit tasks."""
    made = MLProducer(Settings(url=os.environ["RABBITMQ_URL"], store_url=store_url()))
    with transaction.atomic():
        for name in names:
            task = CeleryTask("t", ["PRIVATE"], routing_key="k", task_id=name)
            outbox.add(connection, task, producer=made)


class Pages(TransactionTestCase):
    """What a member of staff sees and does."""

    def setUp(self) -> None:
        """Log in as one who may view and change."""
        user = User.objects.create_user("staff", is_staff=True)
        wanted = ["view_outboxmessage", "change_outboxmessage"]
        user.user_permissions.set(Permission.objects.filter(codename__in=wanted))
        self.client.force_login(user)
        self.user = user
        self.addCleanup(OutboxMessage.objects.all().delete)

    def shown(self, **query: str) -> set[str]:
        """Give the ids that the list shows."""
        response = self.client.get(PAGE, query)
        assert response.status_code == 200
        assert b"PRIVATE" not in response.content
        return {row.message_id for row in response.context["cl"].result_list}

    def act(self, action: str) -> str:
        """Use an action on all rows, and give what it said."""
        keys = list(OutboxMessage.objects.values_list("key", flat=True))
        data = {"action": action, "_selected_action": keys}
        response = self.client.post(PAGE, data, follow=True)
        return " / ".join(str(each) for each in response.context["messages"])

    def hold(self, dead: bool) -> None:
        """Have a store note that a row waits for its retry, or that it is dead."""
        store = PostgreSQLStore(store_url())
        (row,) = store.claim(1)
        record = row.record
        envelope = dead_letter(record.envelope, "dlx", HEADERS) if dead else record.envelope
        noted = Record(envelope, 1, dead=dead, reason="NackError: refused")
        assert store.release([Change(row.claim, noted, 3600.0)]) == []
        store._connection.drop()

    def test_list(self) -> None:
        """It can be searched and filtered; a row is shown without its body, and is not edited."""
        add("a", "b")
        assert self.shown() == {"a", "b"}
        assert self.shown(q="a") == {"a"}
        assert self.shown(situation="ready") == {"a", "b"}
        self.hold(dead=False)
        assert self.shown(situation="later") == {"a"}
        assert self.shown(situation="dead") == set()
        row = OutboxMessage.objects.get(message_id="a")
        address = reverse("admin:mlproducer_outboxmessage_change", args=[row.key])
        page = self.client.get(address)
        assert page.status_code == 200
        assert b"refused" in page.content
        assert b"PRIVATE" not in page.content
        assert self.client.post(address, {"message_id": "c"}).status_code == 403

    def test_send_now(self) -> None:
        """What waits for a retry is due at once; what another process has claimed stays."""
        add("a", "b")
        self.hold(dead=False)
        store = PostgreSQLStore(store_url())
        (claimed,) = store.claim(1)
        assert self.act("send_now") == "1 are sent with the next sweep"
        assert self.shown(situation="ready") == {"a"}
        store.done([claimed.claim])
        store.close()

    def test_replay(self) -> None:
        """Dead letters are published, and no others."""
        add("dead", "b")
        self.hold(dead=True)
        assert self.shown(situation="dead") == {"dead"}
        settings = {"PRODUCER": "mlproducer.MLProducer", "STORE_URL": store_url()}
        with override_settings(MLPRODUCER=settings):
            said = self.act("replay")
        assert said == "1 sent"
        assert self.shown() == {"b"}

    def test_who_may_only_view(self) -> None:
        """The actions are not offered."""
        add("a")
        self.hold(dead=False)
        self.user.user_permissions.set(Permission.objects.filter(codename="view_outboxmessage"))
        assert self.act("send_now") == ""
        assert self.shown(situation="later") == {"a"}
