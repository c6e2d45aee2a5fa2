"""What a user of the library writes."""

import os

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt

from mlproducer import SummarizationTask
from mlproducer.contrib.django import producer, publish_in_transaction, publish_on_commit
from shares.models import Share


@csrf_exempt
def create(request: HttpRequest) -> JsonResponse:
    """Make shares, and have each summarised."""
    with transaction.atomic():
        for text in request.POST.getlist("text"):
            share = Share.objects.create(text=text)
            publish_on_commit(SummarizationTask(share.pk, {"text": text}))
    return JsonResponse({"id": share.pk, "pid": os.getpid()}, status=201)


@csrf_exempt
def broken(request: HttpRequest) -> JsonResponse:
    """Make a share, and fail before the COMMIT."""
    with transaction.atomic():
        share = Share.objects.create(text="x")
        publish_on_commit(SummarizationTask(share.pk, {"text": "x"}))
        raise RuntimeError("after publish_on_commit")


@csrf_exempt
def outbox(request: HttpRequest) -> JsonResponse:
    """Make a share and its task in one transaction, and roll it back if that is asked for."""
    with transaction.atomic():
        share = Share.objects.create(text=request.POST["text"])
        publish_in_transaction(SummarizationTask(share.pk, {"text": request.POST["text"]}))
        if "broken" in request.POST:
            transaction.set_rollback(True)
    return JsonResponse({"id": share.pk, "pid": os.getpid()}, status=201)


async def create_async(request: HttpRequest) -> JsonResponse:
    """Make a share in an event loop, and have it summarised."""
    share = await Share.objects.acreate(text="async")
    receipt = await producer.apublish(SummarizationTask(share.pk, {"text": "async"}))
    body = {"id": share.pk, "pid": os.getpid(), "confirmed": receipt.confirmed}
    return JsonResponse(body, status=201)


create_async.csrf_exempt = True  # the decorator takes no coroutine before Django 5
