"""How fast the library is, against its peers and against what C can do.

``python -m benchmarks`` runs everything, ``--quick`` a short form, ``python -m benchmarks NAME...``
single benchmarks. A benchmark is a module of `benchmarks.suite`; a library that is compared is a
module of `benchmarks.contestants`.
"""
