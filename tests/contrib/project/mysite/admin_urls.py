"""The project's addresses, and the admin site's."""

from django.contrib import admin
from django.urls import path

from mysite import urls

urlpatterns = [path("admin/", admin.site.urls), *urls.urlpatterns]
