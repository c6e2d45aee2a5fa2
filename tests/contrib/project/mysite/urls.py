"""The project's addresses."""

from django.urls import include, path
from shares import views

urlpatterns = [
    path("shares", views.create),
    path("shares/broken", views.broken),
    path("shares/outbox", views.outbox),
    path("shares/async", views.create_async),
    path("ml/", include("mlproducer.contrib.django.urls")),
]
