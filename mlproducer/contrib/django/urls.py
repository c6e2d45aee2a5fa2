"""Health and metrics of the process that answers, and a page for staff.

Mount them with ``path("ml/", include("mlproducer.contrib.django.urls"))``. Health and metrics need
no login; texts with addresses are for staff only.

Runs on: Django's threads.
"""

from __future__ import annotations

import json
from typing import Any

from django.conf import settings
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.urls import NoReverseMatch, path, reverse

from mlproducer.contrib.django.process import producer
from mlproducer.wsgi import make_app

app_name = "mlproducer"

_app = make_app(producer)


def page(request: HttpRequest) -> HttpResponse:
    """Show the page to staff; redirect others to the login, or refuse them."""
    user = getattr(request, "user", None)
    if user is not None and not user.is_authenticated:
        # It imports the user model, which a project may not have.
        from django.contrib.auth.views import redirect_to_login  # noqa: PLC0415

        return redirect_to_login(request.get_full_path(), _login())
    if not _is_staff(request):
        raise PermissionDenied
    return _answer(request, "/")


def page_json(request: HttpRequest) -> HttpResponse:
    """Answer with the data that the page refreshes itself from."""
    if not _is_staff(request):
        raise PermissionDenied
    return _answer(request, "/page.json")


def health(request: HttpRequest) -> HttpResponse:
    """Answer 200 or 503; for staff with the reason, which may have addresses in it."""
    response = _answer(request, "/health")
    if response.content and not _is_staff(request):
        told = json.loads(response.content)
        told.pop("reason", None)
        response.content = json.dumps(told).encode() + b"\n"
        response["Content-Length"] = str(len(response.content))
    return response


def metrics(request: HttpRequest) -> HttpResponse:
    """Answer with the metrics in Prometheus's text format."""
    return _answer(request, "/metrics")


def metrics_json(request: HttpRequest) -> HttpResponse:
    """Answer with the metrics summed up, as JSON."""
    return _answer(request, "/metrics/json")


urlpatterns = [
    path("", page, name="page"),
    path("page.json", page_json, name="page_json"),
    path("health", health, name="health"),
    path("metrics", metrics, name="metrics"),
    path("metrics/json", metrics_json, name="metrics_json"),
]


def _answer(request: HttpRequest, where: str) -> HttpResponse:
    """Answer by the WSGI application."""
    head: list[Any] = []

    def start(status: str, headers: list[tuple[str, str]], *_: object) -> Any:
        head.extend((status, headers))

    body = b"".join(_app({"REQUEST_METHOD": request.method, "PATH_INFO": where}, start))
    status, headers = head
    response = HttpResponse(body, status=int(status.split()[0]))
    for name, value in headers:
        response[name] = value
    return response


def _is_staff(request: HttpRequest) -> bool:
    user = getattr(request, "user", None)
    return user is not None and user.is_active and user.is_staff


def _login() -> str:
    try:
        return str(reverse("admin:login"))
    except NoReverseMatch:
        return str(settings.LOGIN_URL)
