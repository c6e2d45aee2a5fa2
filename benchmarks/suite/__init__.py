"""The benchmarks, a module each: a docstring whose first line is its title, and ``run``.

``run(lab: Lab) -> Report`` measures. To add one, write the module and put its name in `NAMES`.
"""

NAMES = (
    "stages",
    "guard",
    "metrics",
    "imports",
    "storm",
    "memory",
    "pipelined",
    "threads",
    "apart",
    "single",
    "celery_app",
    "scaling",
    "stores",
    "outbox",
    "connections",
    "idle",
)
"""In the order in which they run: those that want no broker first, while there is none."""

LONG = ("growth",)
"""Those that run only where they are asked for."""
