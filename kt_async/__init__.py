"""kt_async: serve mixture-of-experts models that do not fit the GPU."""

__version__ = "0.1.0"
