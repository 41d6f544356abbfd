"""The way in and out: HTTP and gRPC requests become questions, the pipeline answers, text streams back. No torch."""
