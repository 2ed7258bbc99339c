"""zoomr-local: reasoning models that think inside a KV cache of fixed size.

Nothing is imported here, so that ``import zoomr_local`` needs neither the native library nor numpy.
"""

__version__ = "0.1.0"
