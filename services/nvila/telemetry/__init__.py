"""Traces, metrics and logs, alike in every process: names are declared once, exporters follow the OTEL_* variables."""
