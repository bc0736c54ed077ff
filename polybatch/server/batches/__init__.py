"""Batches over HTTP: files of requests, answered with what interactive traffic leaves, by a deadline."""
