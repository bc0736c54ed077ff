"""Measurements of the HTTP server: load, adapters, a client of others, hours of mixed traffic."""
