"""Traces, metrics and logs, the same in every process: names are declared once here, exporters follow the OTEL_* variables."""
